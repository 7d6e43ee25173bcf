"""From a step's rows to tensors, through the model and the sampler. Decides nothing and remembers nothing."""

import time
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from manylora.server.engine.prompt_logprobs import LogprobRows
from manylora.server.engine.sampler import NOT_FINITE, SampledToken, SampleFault, Sampler, SamplingRow
from manylora.server.engine.scheduler import ScheduledRow
from manylora.server.engine.sequence import Sequence
from manylora.server.kernels.step import (
    AdapterRanges,
    AttentionMetadata,
    StepAdapters,
    StepBatch,
    StepOutput,
    WeightedAdapters,
)


class StepModel(Protocol):
    """The model with its KV cache and arena behind it."""

    def __call__(self, batch: StepBatch) -> StepOutput:
        """Compute the batch's tokens."""
        ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came out of a step, by sequence number, and the seconds it took."""

    tokens: Mapping[int, SampledToken]
    """Of the rows that sample and have no fault."""
    faults: Mapping[int, SampleFault]
    """Of the rows in which something is not finite, whether they sample or not: a chunk's keys and values, a
    token's last state, or logits."""
    prompt_logprobs: Mapping[int, LogprobRows]
    """Of the prompt tokens that follow each token of the row."""
    model_seconds: float
    sample_seconds: float


class ModelRunner:
    """Runs steps of one model on one device."""

    def __init__(
        self,
        model: StepModel,
        sampler: Sampler,
        block_size: int,
        table: Callable[[int], "array[int]"],
        ranges: Callable[[int], AdapterRanges],
    ) -> None:
        self._model = model
        self._sampler = sampler
        self._block_size = block_size
        self._table = table
        self._ranges = ranges

    @torch.inference_mode()
    def run(self, rows: tuple[ScheduledRow, ...]) -> StepResult:
        """Compute the rows and sample those that end at their sequence's last token."""
        began = time.perf_counter()
        token_ids = [t for r in rows for t in r.sequence.token_ids[r.start : r.start + r.length]]
        wanted, places = _logits_rows(rows)
        batch = StepBatch(
            np.array(token_ids, dtype=np.int32),
            self._attention(rows),
            StepAdapters.of_rows([self._adapters(row.sequence) for row in rows]),
            np.array(wanted, dtype=np.int32),
        )
        output = self._model(batch)
        modelled = time.perf_counter()
        sampled = self._sample(output.logits, rows, places)
        faults = _faults(rows, output.finite.tolist())
        faults |= {number: found for number, found in sampled.items() if isinstance(found, SampleFault)}
        tokens = {
            number: token
            for number, token in sampled.items()
            if number not in faults and not isinstance(token, SampleFault)
        }
        reports = self._prompt_logprobs(output.logits, rows, places, faults)
        return StepResult(tokens, faults, reports, modelled - began, time.perf_counter() - modelled)

    def _attention(self, rows: tuple[ScheduledRow, ...]) -> AttentionMetadata:
        return AttentionMetadata.of_rows(
            [row.start for row in rows],
            [row.length for row in rows],
            [self._table(row.sequence.number) for row in rows],
            self._block_size,
        )

    def _adapters(self, sequence: Sequence) -> WeightedAdapters:
        return tuple((self._ranges(adapter_id), weight) for adapter_id, weight in sequence.adapters)

    def _sample(
        self, logits: Tensor, rows: tuple[ScheduledRow, ...], places: list[int]
    ) -> dict[int, SampledToken | SampleFault]:
        chosen = [(row.sequence, place) for row, place in zip(rows, places, strict=True) if row.samples]
        if not chosen:
            return {}
        part = logits
        if len(chosen) != len(logits):
            part = logits[torch.tensor([place for _, place in chosen], device=logits.device)]
        found = self._sampler.sample(part, [_sampling_row(sequence) for sequence, _ in chosen])
        return {sequence.number: token for (sequence, _), token in zip(chosen, found, strict=True)}

    def _prompt_logprobs(
        self,
        logits: Tensor,
        rows: tuple[ScheduledRow, ...],
        places: list[int],
        faults: dict[int, SampleFault],
    ) -> dict[int, LogprobRows]:
        """Report rows that ask for it; one with logits that are not finite gets a fault instead."""
        reports: dict[int, LogprobRows] = {}
        for row, place in zip(rows, places, strict=True):
            sequence = row.sequence
            top = sequence.owner.request.sampling.prompt_logprobs
            if top is not None and sequence.wants_prompt_logprobs and sequence.number not in faults:
                ids = sequence.token_ids[row.start + 1 : row.start + row.length + 1]
                first = place - row.length + 1
                part = logits[first : first + len(ids)]
                found = self._sampler.prompt_logprobs(part, ids, top)
                if isinstance(found, SampleFault):
                    faults[sequence.number] = found
                else:
                    reports[sequence.number] = found
        return reports


def _faults(rows: tuple[ScheduledRow, ...], finite: list[bool]) -> dict[int, SampleFault]:
    """Return a fault for each row with a token that is not finite; ``finite`` is by token."""
    faults: dict[int, SampleFault] = {}
    if all(finite):
        return faults
    start = 0
    for row in rows:
        if not all(finite[start : start + row.length]):
            faults[row.sequence.number] = NOT_FINITE
        start += row.length
    return faults


def _logits_rows(rows: tuple[ScheduledRow, ...]) -> tuple[list[int], list[int]]:
    """Return which tokens need logits, and for each row the place of its last one among them."""
    wanted: list[int] = []
    places: list[int] = []
    end = 0
    for row in rows:
        end += row.length
        if row.sequence.wants_prompt_logprobs:
            wanted += range(end - row.length, end)
        elif row.samples:
            wanted.append(end - 1)
        places.append(len(wanted) - 1)
    return wanted, places


def _sampling_row(sequence: Sequence) -> SamplingRow:
    return SamplingRow(sequence.owner.request.sampling, sequence.text.sampler)
