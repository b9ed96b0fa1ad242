"""Libraries are silenced in one place; whoever asks Python for warnings gets them."""

import subprocess
import sys

import pytest

CHATTER = """
import logging, warnings
from srpo_cli.runtime.quiet import quiet_libraries
import diffusers, transformers
quiet_libraries()
warnings.warn("advice", FutureWarning)
logging.warning("advice")
for library in (diffusers, transformers):
    log = library.utils.logging
    log.get_logger("x").warning("advice")
    for _ in log.tqdm(range(3)):
        pass
"""


@pytest.mark.slow
@pytest.mark.parametrize(("options", "heard"), [([], False), (["-W", "default"], True)])
def test_libraries_say_nothing_unless_asked(options, heard):
    process = subprocess.run([sys.executable, *options, "-c", CHATTER], capture_output=True, text=True, check=True)
    assert process.stdout == ""
    assert ("FutureWarning: advice" in process.stderr) == heard
    assert heard or process.stderr == ""
