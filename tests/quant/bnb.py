"""bitsandbytes, imported once and quietly: it warns that an optional kernel package isn't there."""

import logging

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import bitsandbytes.functional as functional  # noqa: E402  # after its logger is quiet

__all__ = ["functional"]
