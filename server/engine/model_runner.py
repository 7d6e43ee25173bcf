"""From a step's rows to tensors, through the model and the sampler, in two halves. Decides nothing."""

import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from manylora.server.engine.grammar import GrammarFault, Words
from manylora.server.engine.logits import SamplingRow
from manylora.server.engine.outbox import wake
from manylora.server.engine.prompt_logprobs import LogprobRows
from manylora.server.engine.request import Pooling, TokenLogprobs, Vector
from manylora.server.engine.sampler import NOT_FINITE, SampledToken, SampleFault, Sampler, tokens_of
from manylora.server.engine.samplers import Samplers
from manylora.server.engine.steady import SteadyStep
from manylora.server.engine.step_plan import ScheduledRow
from manylora.server.engine.step_rows import StepRows
from manylora.server.kernels.output import StepOutput
from manylora.server.kernels.sampling import NOT_FINITE as NO_TOKEN
from manylora.server.kernels.sampling import UNTOLD, NativeSampling, SamplingColumns
from manylora.server.kernels.step import AdapterRanges, StepBatch

Rows = tuple[ScheduledRow, ...]


class StepModel(Protocol):
    """The model with its KV cache and arena behind it."""

    @property
    def sampling(self) -> NativeSampling | None:
        """How it samples; None: it doesn't, and is given no columns."""
        ...

    def launch(self, batch: StepBatch, columns: SamplingColumns | None) -> Any:
        """Begin to compute the batch's tokens, and to sample; don't wait."""
        ...

    @property
    def wakes(self) -> bool:
        """Whether ``collect`` wakes somebody; see Backend."""
        ...

    def collect(self, launched: Any, wake: int = -1) -> StepOutput:
        """Wait for what was launched."""
        ...


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step under way."""

    rows: Rows
    places: list[int]
    """Of each row: its last token among those whose logits are wanted."""
    states: Mapping[int, slice]
    """Of the sequences that are pooled: where theirs are among the states that are wanted."""
    launched: Any
    build_seconds: float
    """That the batch took to be built and handed over."""
    steady: bool = False
    """Whether each row gives a next token and nothing else."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came out of a step, row by row or by sequence number, and the seconds it took."""

    token_ids: list[int | None]
    """Of each row; None: it doesn't sample. One with a fault may have one too."""
    logprobs: Mapping[int, TokenLogprobs]
    """Of the rows' tokens whose requests want them, by number of the row."""
    faults: Mapping[int, SampleFault]
    """Of the sequences in which something is not finite, whether they sample or not: a chunk's keys and values, a
    token's last state, or logits."""
    broken: Mapping[int, GrammarFault]
    """Of the sequences whose grammar can't go on. What was computed of them is sound."""
    prompt_logprobs: Mapping[int, LogprobRows]
    """Of the prompt tokens that follow each token of the row, by sequence."""
    states: Mapping[int, Vector]
    """[n, hidden]: of the row's tokens that are pooled, by sequence."""
    model_seconds: float
    """Layers and head, measured where they ran."""
    sample_seconds: float
    glue_seconds: float
    """What else the two halves took."""


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
        self._samplers = Samplers(sampler)
        self._rows = StepRows(block_size, sampler.vocab_size, table, ranges)
        self._table, self._ranges, self._block_size = table, ranges, block_size
        self._steady: SteadyStep | None = None

    def launch(self, rows: Rows) -> LaunchedStep:
        """Begin to compute the rows, and to sample those that end at their sequence's last token."""
        began = time.perf_counter()
        steady = self._steady
        if steady is not None and steady.goes_on(rows, self._table, self._ranges):
            launched = self._model.launch(steady.batch, steady.columns)
            return LaunchedStep(rows, steady.places, {}, launched, time.perf_counter() - began, steady=True)
        self._steady = None
        wanted, places = _logits_rows(rows)
        wanted_states, states = _state_rows(rows)
        batch = self._rows.batch(rows, wanted, wanted_states)
        columns = None if batch.adapters.have_vocabularies else self._columns(rows, places)
        if columns is not None and len(places) == len(batch.token_ids):
            self._steady = SteadyStep.of(rows, batch, columns, self._table, self._ranges, self._block_size)
        launched = self._model.launch(batch, columns)
        return LaunchedStep(rows, places, states, launched, time.perf_counter() - began)

    def collect(self, step: LaunchedStep, listener: int = -1) -> StepResult:
        """Wait for a step, and sample what the model didn't; ``listener``: what Backend.collect may wake.

        What may follow by the rows' grammars is found out first: beside the step, where a device computes it.
        """
        if step.steady:
            return self._collect_steady(step, listener)
        began = time.perf_counter()
        masks, broken = self._masked(step.rows)
        if not self._model.wakes:
            wake(listener)
        masked = time.perf_counter() - began
        output = self._model.collect(step.launched, listener)
        return self._taken(step, output, began, masked, masks, broken)

    def _collect_steady(self, step: LaunchedStep, listener: int) -> StepResult:
        """Collect a step of which there is no more to say than its tokens, unless something isn't finite."""
        if not self._model.wakes:
            wake(listener)
        began = time.perf_counter()
        output = self._model.collect(step.launched, listener)
        ids: list[int | None] = [] if output.sampled is None else output.sampled.ids.tolist()
        if not output.all_finite or not ids or NO_TOKEN in ids:
            return self._taken(step, output, began, 0.0, {}, {})
        spent = time.perf_counter() - began + step.build_seconds
        glue = max(0.0, spent - output.model_seconds - output.sample_seconds)
        return StepResult(ids, {}, {}, {}, {}, {}, output.model_seconds, output.sample_seconds, glue)

    def _taken(
        self,
        step: LaunchedStep,
        output: StepOutput,
        began: float,
        masked: float,
        masks: Mapping[int, Words],
        broken: Mapping[int, GrammarFault],
    ) -> StepResult:
        """Return what came out of a step; ``masked`` seconds of it went into masks."""
        modelled = time.perf_counter()
        faults = {} if output.all_finite else _faults(step.rows, output.finite)
        chosen = [number for number, row in enumerate(step.rows) if row.samples]
        tokens: list[int | None] = [None] * len(step.rows)
        logprobs: dict[int, TokenLogprobs] = {}
        for number, token in zip(chosen, self._sampled(step, output, chosen, masks), strict=True):
            if isinstance(token, int):
                tokens[number] = token
            elif isinstance(token, SampleFault):
                faults.setdefault(step.rows[number].sequence.number, token)
            else:
                tokens[number] = token.token_id
                if token.logprobs is not None:
                    logprobs[number] = token.logprobs
        own_seconds = output.sample_seconds
        if output.sampled is None and chosen:
            own_seconds = time.perf_counter() - modelled
        reports = self._prompt_logprobs(output, step, faults)
        own_seconds += masked
        spent = time.perf_counter() - began + step.build_seconds
        glue = max(0.0, spent - output.model_seconds - own_seconds)
        states: dict[int, Vector] = {}
        if output.states is not None:
            told = output.states.cpu().numpy()
            states = {number: told[place] for number, place in step.states.items()}
        return StepResult(
            tokens, logprobs, faults, broken, reports, states, output.model_seconds, own_seconds, glue
        )

    def _masked(self, rows: Rows) -> tuple[dict[int, Words], dict[int, GrammarFault]]:
        """Return the masks of the rows that have one, by number, and the faults by sequence."""
        held = [
            (number, row.sequence.number, matcher)
            for number, row in enumerate(rows)
            if row.samples and (matcher := row.sequence.text.grammar) is not None
        ]
        if not held:
            return {}, {}
        words, faults = self._samplers.fill([matcher for _, _, matcher in held])
        sound = {held[i][0]: each for i, each in words.items()}
        return sound, {held[i][1]: fault for i, fault in faults.items()}

    def _columns(self, rows: Rows, places: list[int]) -> SamplingColumns | None:
        """Return how the model is to sample; None: it can't, or edits of the logits and masks come between."""
        if self._model.sampling is None:
            return None
        chosen = [(row, place) for row, place in zip(rows, places, strict=True) if row.samples]
        texts = [row.sequence.text for row, _ in chosen]
        if not chosen or any(text.sampler.edits or text.grammar is not None for text in texts):
            return None
        return self._rows.columns([row for row, _ in chosen], [place for _, place in chosen])

    def _sampled(
        self, step: LaunchedStep, output: StepOutput, chosen: list[int], masks: Mapping[int, Words]
    ) -> Sequence[SampledToken | SampleFault | int]:
        """Return the tokens of the rows of these numbers, as objects where there is more to say than their ids."""
        if not chosen:
            return []
        if output.sampled is not None:
            told = [step.rows[number].sequence.told for number in chosen]
            ids: list[int] = output.sampled.ids.tolist()
            plain = max(told) == UNTOLD and min(ids) >= 0
            return ids if plain else tokens_of(output.sampled, told)
        rows = [_sampling_row(step.rows[number], masks.get(number)) for number in chosen]
        return self._samplers.sample(output, [step.places[number] for number in chosen], rows)

    def _prompt_logprobs(
        self, output: StepOutput, step: LaunchedStep, faults: dict[int, SampleFault]
    ) -> dict[int, LogprobRows]:
        """Report rows that ask for it; one with logits that are not finite gets a fault instead."""
        reports: dict[int, LogprobRows] = {}
        for row, place in zip(step.rows, step.places, strict=True):
            sequence = row.sequence
            top = sequence.owner.request.sampling.prompt_logprobs
            if top is not None and sequence.wants_prompt_logprobs and sequence.number not in faults:
                ids = sequence.token_ids[row.start + 1 : row.start + row.length + 1]
                found = self._samplers.prompt_logprobs(output, place - row.length + 1, ids, top)
                if isinstance(found, SampleFault):
                    faults[sequence.number] = found
                else:
                    reports[sequence.number] = found
        return reports


def _faults(rows: Rows, finite: Tensor) -> dict[int, SampleFault]:
    """Return a fault for each row with a token that is not finite; ``finite`` is by token."""
    faults: dict[int, SampleFault] = {}
    if bool(finite.all()):
        return faults
    start, each = 0, finite.tolist()
    for row in rows:
        if not all(each[start : start + row.length]):
            faults[row.sequence.number] = NOT_FINITE
        start += row.length
    return faults


def _logits_rows(rows: Rows) -> tuple[list[int], list[int]]:
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


def _state_rows(rows: Rows) -> tuple[list[int], dict[int, slice]]:
    """Return which tokens' states are wanted, and where each pooled sequence's are among them."""
    wanted: list[int] = []
    places: dict[int, slice] = {}
    end = 0
    for row in rows:
        end += row.length
        pooling = row.sequence.pooling
        if pooling is not None:
            last = row.start + row.length
            whole = last == len(row.sequence.token_ids)
            counted = min(row.length, max(0, last - row.sequence.pooled_from))
            first = end - (counted if pooling is Pooling.MEAN else whole)
            places[row.sequence.number] = slice(len(wanted), len(wanted) + end - first)
            wanted += range(first, end)
    return wanted, places


def _sampling_row(row: ScheduledRow, mask: Words | None) -> SamplingRow:
    return SamplingRow(row.sequence.owner.request.sampling, row.sequence.text.sampler, mask)
