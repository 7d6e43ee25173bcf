"""Calls that take a step from its tokens to the next ones: what they point into, and what comes out."""

import ctypes

import numpy as np
import torch
from torch import Tensor

from manylora.server.kernels.cpu import abi
from manylora.server.kernels.cpu.plan import CpuPlan
from manylora.server.kernels.output import StepOutput
from manylora.server.kernels.sampling import UNTOLD, Sampled, SamplingColumns
from manylora.server.kernels.step import Ints


class SamplingCall:
    """ml_sampling of some rows of logits."""

    def __init__(self, logits: Tensor, columns: SamplingColumns) -> None:
        """``columns`` are contiguous."""
        drawn = {
            name: getattr(columns, name).ctypes.data
            for name in ("inverse_temperature", "top_k", "top_p", "min_p", "seed", "choice", "position")
        }
        if columns.masks:
            each = [0 if mask is None else mask.ctypes.data for mask in columns.masks]
            self._masks = np.array(each, dtype=np.uint64)
            drawn["masks"] = self._masks.ctypes.data
        ids = np.empty(len(columns.places), dtype=np.int32)
        self._lay_out(logits, columns.places, ids, columns.told, drawn)
        self._kept = columns

    @classmethod
    def of_given(cls, logits: Tensor, places: Ints, ids: Ints, told: Ints) -> "SamplingCall":
        """Return the call that tells of tokens that are given."""
        call = cls.__new__(cls)
        call._lay_out(logits, places, ids.copy(), told, {})
        return call

    def _lay_out(self, logits: Tensor, places: Ints, ids: Ints, told: Ints, columns: dict[str, int]) -> None:
        count, vocab = len(places), logits.shape[1]
        top = max(0, min(int(told.max(initial=UNTOLD)), vocab))
        self.sampled = Sampled(
            ids, np.zeros(count), np.zeros((count, top), dtype=np.int32), np.zeros((count, top))
        )
        self._structure = abi.Sampling(
            rows=count,
            vocab=vocab,
            top=top,
            logits=logits.data_ptr(),
            places=places.ctypes.data,
            told=told.ctypes.data,
            ids=ids.ctypes.data,
            logprobs=self.sampled.logprobs.ctypes.data,
            top_ids=self.sampled.top_ids.ctypes.data,
            top_logprobs=self.sampled.top_logprobs.ctypes.data,
            **columns,
        )
        self._given = (logits, places, told)

    @property
    def address(self) -> int:
        """Of the structure that kernels read."""
        return ctypes.addressof(self._structure)


class CpuStep:
    """A step that is ready to be run. Its results last until the model's next one is laid out."""

    def __init__(
        self, plan: CpuPlan, x: Tensor, call: abi.Call, rows: Ints, columns: SamplingColumns | None
    ) -> None:
        self.plan = plan
        self.x = x
        self._of = (rows, columns)
        index = np.ascontiguousarray(rows, dtype=np.int32)
        hidden = self.hidden = plan.model.buffer("hidden", len(rows), x.shape[1])
        self._logits = plan.model.buffer("logits", len(rows), plan.model.structure.vocab)
        self._sampling = None if columns is None else SamplingCall(self._logits, columns)
        self._seconds = np.zeros(2)
        self._structure = abi.RunCall(
            call=ctypes.addressof(call),
            rows=index.ctypes.data,
            count=len(index),
            hidden=hidden.data_ptr(),
            logits=self._logits.data_ptr(),
            sampling=None if self._sampling is None else self._sampling.address,
            seconds=self._seconds.ctypes.data,
        )
        self._kept = (call, index, hidden)

    def is_of(self, plan: CpuPlan, rows: Ints, columns: SamplingColumns | None) -> bool:
        """Whether it was laid out for these very objects, whatever their arrays say now."""
        return self.plan is plan and self._of[0] is rows and self._of[1] is columns

    def address(self, wake: int) -> int:
        """Return that of the structure that kernels read; ``wake``: see Backend.collect."""
        self._structure.wake = wake
        return ctypes.addressof(self._structure)

    def output(self, states: Tensor | None = None) -> StepOutput:
        """Return what the call left, and the states that were wanted."""
        model_seconds, sample_seconds = self._seconds.tolist()
        strange, tokens = self._structure.strange, self.plan.structure.tokens
        return StepOutput(
            self._logits[:0] if self._structure.searched else self._logits,
            torch.from_numpy(self.plan.finite.view(np.bool_)) if strange else self.plan.model.truth(tokens),
            strange == 0,
            None if self._sampling is None else self._sampling.sampled,
            states,
            model_seconds,
            sample_seconds,
        )
