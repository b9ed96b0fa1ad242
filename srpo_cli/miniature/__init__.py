"""The built-in model set: a rendered world, a FLUX-layout pipeline trained on it, a biased reward, an honest oracle."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
