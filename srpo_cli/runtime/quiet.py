"""Keep the libraries' own talk off the user's terminal: progress bars, advice, deprecations."""

from __future__ import annotations

import logging
import sys
import warnings

import diffusers
import huggingface_hub
import transformers


def quiet_libraries() -> None:
    """Leave only errors. Nothing here warns for itself, so every Python warning is a library's.

    Whoever asks Python for warnings (``python -W``, ``PYTHONWARNINGS``) gets them.
    """
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    huggingface_hub.utils.disable_progress_bars()
    huggingface_hub.utils.logging.set_verbosity_error()  # it tells of every retry
    logging.getLogger().setLevel(logging.ERROR)  # open_clip and torch.distributed log to the root
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
