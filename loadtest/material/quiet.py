"""Keeps other packages' progress bars and advice out of a benchmark's report."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def advice_off() -> Iterator[None]:
    """Silence transformers' progress bars, advice that peft means for training, and notes about absent kernels."""
    from transformers.utils import logging as transformers_logging

    kernels = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = kernels.level
    kernels.setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        kernels.setLevel(level)
        transformers_logging.enable_progress_bar()
