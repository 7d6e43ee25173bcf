"""What libraries say that no user can act on, not said."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Leave out transformers' word to peft that a property was renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def quiet_bitsandbytes() -> None:
    """Leave out that an optional CPU kernel isn't installed, which bitsandbytes logs as an error."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.CRITICAL)
