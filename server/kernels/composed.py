"""A step in two halves for backends that have no call of their own for it: their ops, one after the other."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

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
    others: Mapping[int, Tensor]
    """See StepOutput."""
    seconds: float
    """That the ops took, on a device that has done them when they return."""
    times: "tuple[torch.cuda.Event, torch.cuda.Event] | None"
    """Before and after them, on one that has not."""


Take: TypeAlias = Callable[[Any, Ints], tuple[Tensor, Tensor] | None]
"""Compute the whole of a plan in another way: return logits of tokens and which are finite; None: op by op."""


def launch_composed(
    backend: AnyBackend, plan: Any, rows: Ints, state_rows: Ints, take: Take | None = None
) -> Composed:
    """See Backend.launch; ``state_rows``: the batch's."""
    began = time.perf_counter()
    times = None
    if backend.device.type == "cuda":
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        times = (before, after)
        times[0].record()
    states = None
    others: Mapping[int, Tensor] = {}
    taken = None if take is None else take(plan, rows)
    if taken is None:
        x = backend.forward(plan)
        hidden = backend.hidden(plan, x, rows)
        logits = backend.logits(plan, hidden, rows.shape[0])
        others = backend.answer(plan, rows, hidden, logits)
        taken = logits, backend.finite(plan, x)
        if len(state_rows):
            states = backend.hidden(plan, x, state_rows)[: len(state_rows)].float()
    if times is not None:
        times[1].record()
    return Composed(*taken, states, others, time.perf_counter() - began, times)


def collect_composed(launched: Composed) -> StepOutput:
    """See Backend.collect."""
    seconds = launched.seconds
    if launched.times is not None:
        before, after = launched.times
        after.synchronize()
        seconds = before.elapsed_time(after) / 1000
    return StepOutput(
        launched.logits,
        launched.finite,
        states=launched.states,
        others=launched.others,
        model_seconds=seconds,
    )
