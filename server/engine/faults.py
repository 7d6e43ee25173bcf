"""What clients are told of faults that are nobody's fault but the server's."""

import logging

import torch

from manylora.server.errors import StepFailed

log = logging.getLogger(__name__)


def step_failed(what: str, error: Exception) -> StepFailed:
    """Log a fault and return what clients are told. The traceback goes: its frames hold the step's tensors."""
    log.error("%s", what, exc_info=error)
    memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    why = "out of memory" if memory else type(error).__name__
    failed = StepFailed(f"{what} ({why}); the server goes on")
    failed.__cause__ = error.with_traceback(None)
    return failed
