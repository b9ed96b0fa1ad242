"""``benchmarks`` is not part of the package: it is found beside the tests, behind everything that is installed."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
