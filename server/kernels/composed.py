"""A step in two halves for backends that have no call of their own for it: their ops, one after the other."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manylora.server.kernels.backend import AnyBackend
from manylora.server.kernels.output import StepOutput
from manylora.server.kernels.step import Ints


@dataclass(frozen=True, slots=True)
class Composed:
    """A step whose ops the device has been given."""

    logits: Tensor
    finite: Tensor
    states: Tensor | None
    seconds: float
    """That the ops took, on a device that has done them when they return."""
    times: "tuple[torch.cuda.Event, torch.cuda.Event] | None"
    """Before and after them, on one that has not."""


def launch_composed(backend: AnyBackend, plan: Any, rows: Ints, state_rows: Ints) -> Composed:
    """See Backend.launch; ``state_rows``: the batch's."""
    began = time.perf_counter()
    times = None
    if backend.device.type == "cuda":
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        times = (before, after)
        times[0].record()
    x = backend.forward(plan)
    hidden = backend.hidden(plan, x, rows)
    logits = backend.logits(plan, hidden, rows.shape[0])
    finite = backend.finite(plan, x)
    states = None
    if len(state_rows):
        states = backend.hidden(plan, x, state_rows)[: len(state_rows)].float()
    if times is not None:
        times[1].record()
    return Composed(logits, finite, states, time.perf_counter() - began, times)


def collect_composed(launched: Composed) -> StepOutput:
    """See Backend.collect."""
    seconds = launched.seconds
    if launched.times is not None:
        before, after = launched.times
        after.synchronize()
        seconds = before.elapsed_time(after) / 1000
    return StepOutput(launched.logits, launched.finite, states=launched.states, model_seconds=seconds)
