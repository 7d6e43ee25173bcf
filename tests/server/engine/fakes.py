"""A model whose logits depend on every token before, read through the block table, and on the arena's rows.

So a wrong block, a stale row or another request's adapter changes the tokens.
"""

import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import torch

from manylora.adapters.types import AdapterWeights, LoraPair
from manylora.server.engine.adapter_cache import HeldAdapter
from manylora.server.engine.engine import Engine, EngineSettings
from manylora.server.engine.observer import EndedRequest, SilentEngineObserver, StepTimings
from manylora.server.engine.request import FinishReason, GenerationRequest, SamplingParams, SequenceOutput
from manylora.server.engine.step_plan import SchedulerLimits
from manylora.server.kernels.output import StepOutput
from manylora.server.kernels.sampling import SamplingColumns
from manylora.server.kernels.step import (
    LORA_MODULES,
    AdapterRanges,
    AttentionMetadata,
    Ints,
    RankRange,
    StepBatch,
    lora_spans,
)

VOCAB = 64
LAYER = "model.layers.0.self_attn."


def weights(value: int, rank: int = 4) -> AdapterWeights:
    """An adapter that is told by ``value``."""
    pair = LoraPair(torch.full((rank, 2), float(value)), torch.full((rank, 2), float(value)))
    return AdapterWeights({f"{LAYER}q_proj": pair, f"{LAYER}v_proj": pair})


class FakeArena:
    """Rows that remember whose they are. ``fault`` is raised by the next change."""

    def __init__(self, rows: int) -> None:
        self.rows = {module: np.zeros(rows) for module in LORA_MODULES}
        self.fault: Exception | None = None
        self.writes = self.moves = self.pieces = 0

    def write(self, ranges: AdapterRanges, weights: AdapterWeights) -> None:
        for _ in self.writing(ranges, weights):
            pass

    def writing(self, ranges: AdapterRanges, weights: AdapterWeights) -> Iterator[None]:
        self._raise()
        self.writes += 1
        value = float(next(iter(weights.pairs.values())).a[0, 0])
        for module, owned in ranges.items():
            for row in range(owned.start, owned.start + owned.rank):
                self.rows[module][row] = value
                self.pieces += 1
                yield

    def move(self, module: str, source: RankRange, target_start: int) -> None:
        for _ in self.moving(module, source, target_start):
            pass

    def moving(self, module: str, source: RankRange, target_start: int) -> Iterator[None]:
        self._raise()
        self.moves += 1
        rows = self.rows[module]
        for row in range(source.rank):
            rows[target_start + row] = rows[source.start + row]
            self.pieces += 1
            yield

    def release(self, ranges: AdapterRanges) -> None:
        """What an adapter has beside rank rows: nothing."""

    def value(self, ranges: AdapterRanges) -> int:
        """The value of the adapter that owns the ranges; they must be whole."""
        found = {v for m, r in ranges.items() for v in self.rows[m][r.start : r.start + r.rank].tolist()}
        assert len(found) == 1, f"rows of several adapters in one range: {found}"
        return int(found.pop())

    def _raise(self) -> None:
        fault, self.fault = self.fault, None
        if fault is not None:
            raise fault


def next_logits(context: Sequence[int]) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
    # Weights below 0 make marks below 0, which no seed takes.
    return np.random.default_rng([each % 2**32 for each in context]).random(VOCAB, dtype=np.float32)


def mark_of(adapters: Sequence[tuple[int, float]]) -> int:
    """What (value, weight) pairs add to a token's KV. A weight is a float32's value, as a step has it."""
    return sum(int(1000 * value * float(np.float32(weight))) for value, weight in adapters)


def expected(
    prompt: Sequence[int],
    count: int,
    adapters: Sequence[tuple[int, float]] = (),
    invocations: Mapping[int, Sequence[int]] = MappingProxyType({}),
) -> list[int]:
    """Greedy tokens that follow the prompt, computed alone; ``invocations`` of the adapters that have one, by id."""
    tokens = list(prompt)
    from_places = {i: _last_place(prompt, invocation) for i, invocation in invocations.items() if invocation}

    def marked(place: int) -> int:
        return tokens[place] + 64 * mark_of(
            [part for part in adapters if from_places.get(part[0], 0) <= place]
        )

    for _ in range(count):
        tokens.append(int(next_logits([marked(place) for place in range(len(tokens))]).argmax()))
    return tokens[len(prompt) :]


def _last_place(prompt: Sequence[int], invocation: Sequence[int]) -> float:
    """Where ``invocation`` begins for the last time, looked for place by place; infinity: nowhere."""
    places = range(len(prompt) - len(invocation), -1, -1)
    found = (i for i in places if list(prompt[i : i + len(invocation)]) == list(invocation))
    return next(found, float("inf"))


class FakeModel:
    """Computes a token's logits from what the KV cache holds of its context.

    ``fault`` decides, seeing the step's token ids, whether the step raises; ``bad`` which tokens' logits are NaN though
    nothing else is; ``overflows``, seeing a token and its adapters' mark, whose keys and values are NaN. What attends
    to NaN is NaN.
    """

    def __init__(self, arena: FakeArena, slots: int, block_size: int) -> None:
        self.arena = arena
        self.block_size = block_size
        self.kv = np.full(slots, -1.0)
        self.fault: Callable[[list[int]], Exception | None] = lambda tokens: None
        self.bad: Callable[[int], bool] = lambda token: False
        self.overflows: Callable[[int, int], bool] = lambda token, mark: False
        self.computed = 0
        self.widest = 0

    sampling = None
    wakes = False

    def launch(self, batch: StepBatch, columns: SamplingColumns | None) -> StepBatch:
        assert columns is None, "it can't sample"
        return batch

    def collect(self, launched: StepBatch, wake: int = -1) -> StepOutput:
        return self(launched)

    def __call__(self, batch: StepBatch) -> StepOutput:
        tokens, attention, spans = batch.token_ids, batch.attention, lora_spans(batch)
        assert sum(span.length for span in spans) == len(tokens)
        fault = self.fault(tokens.tolist())
        if fault is not None:
            self.kv[attention.slots] = -7
            raise fault
        self.computed += len(tokens)
        self.widest = max(self.widest, len(attention.context_lens))
        marks = np.zeros(len(tokens), dtype=np.int64)
        for span in spans:
            pairs = [(self.arena.value(ranges), weight) for ranges, weight in span.adapters]
            marks[span.start : span.start + span.length] = mark_of(pairs)
        self.kv[attention.slots] = tokens + 64.0 * marks
        finite = self._spoil(tokens.tolist(), marks.tolist(), attention)
        rows = [self._logits(int(i), int(tokens[i]), attention) for i in batch.logits_rows]
        logits = torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, VOCAB)
        states = [self._logits(int(i), int(tokens[i]), attention) for i in batch.state_rows]
        told = torch.from_numpy(np.stack(states)) if states else None
        return StepOutput(logits, torch.tensor(finite), states=told)

    def _spoil(self, tokens: list[int], marks: list[int], attention: AttentionMetadata) -> list[bool]:
        """Write NaN for what overflows and for what attends to it, token by token; say which are finite."""
        slots = attention.slots.tolist()
        for slot, token, mark in zip(slots, tokens, marks, strict=True):
            if self.overflows(token, mark):
                self.kv[slot] = np.nan
        for place in range(len(tokens)) if np.isnan(self.kv).any() else ():
            if np.isnan(self.kv[self._context(place, attention)]).any():
                self.kv[slots[place]] = np.nan
        return [not bool(each) for each in np.isnan(self.kv[slots])]

    def _context(self, place: int, attention: AttentionMetadata) -> Ints:
        """Slots of the context of the token at ``place``, its own included."""
        positions = np.arange(int(attention.positions[place]) + 1)
        owner = bisect_right(attention.query_start.tolist(), place) - 1
        table = attention.block_tables[owner]
        found: Ints = table[positions // self.block_size]
        return found * self.block_size + positions % self.block_size

    def _logits(
        self, place: int, token: int, attention: AttentionMetadata
    ) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
        context = self.kv[self._context(place, attention)]
        if self.bad(token) or np.isnan(context).any():
            return np.full(VOCAB, np.nan, dtype=np.float32)
        return next_logits([int(each) for each in context])


class Letters:
    """Token t is a letter; those in ``broken`` can't be decoded, those in ``halves`` begin a character."""

    strips_first_space = False

    def __init__(self) -> None:
        self.broken: set[int] = set()
        self.halves: set[int] = set()

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self.broken:
            raise RuntimeError("the tokenizer has a fault")
        return b"\xe2" if token_id in self.halves else bytes([65 + token_id])


class Recorder(SilentEngineObserver):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.ended: list[EndedRequest] = []
        self.steps: list[StepTimings] = []

    def step_finished(self, timings: StepTimings) -> None:
        self.steps.append(timings)

    def request_ended(self, ended: EndedRequest) -> None:
        self.ended.append(ended)


@dataclass(frozen=True)
class Pools:
    """Sizes of a test's engine."""

    blocks: int = 64
    block_size: int = 4
    rows: int = 64
    host_bytes: int = 1 << 30
    max_running: int = 16
    max_step_tokens: int = 32
    adapter_timeout: float = 1e9
    max_overtakes: int = 8
    max_step_context: int = 8192


@dataclass
class Harness:
    """An engine on the fake model, run by hand."""

    pools: Pools = field(default_factory=Pools)
    loads: list[HeldAdapter] = field(default_factory=list)
    outputs: list[SequenceOutput] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.arena = FakeArena(self.pools.rows)
        slots = (self.pools.blocks + 1) * self.pools.block_size
        self.model = FakeModel(self.arena, slots, self.pools.block_size)
        self.letters = Letters()
        self.observer = Recorder()
        self.reads: Counter[int] = Counter()
        self.engine = make_engine(
            self.pools, self.model, self.arena, self.letters, self.loads.append, self.observer
        )

    def know(
        self,
        adapter_id: int,
        rank: int = 4,
        *,
        pinned: bool = False,
        cold: bool = False,
        invocation: Sequence[int] = (),
    ) -> None:
        """Add an adapter whose value is its id."""
        held = replace(weights(adapter_id, rank), invocation=tuple(invocation))

        def load_from() -> AdapterWeights:
            self.reads[adapter_id] += 1
            return held

        host, words = None if cold else held, held.invocation
        entry = HeldAdapter(adapter_id, held.rank_by_module(), load_from, pinned, host, invocation=words)
        self.engine.add_adapter(entry)

    def preload(self, adapter_id: int) -> None:
        """Put an adapter on the device by itself, in as many steps as that takes."""
        while not self.engine.preload(adapter_id, None):
            self.engine.step()

    def change_the_arena_in_pieces(self) -> None:
        """From now on one piece of a change is carried out in a step beside streams, and no more."""
        self.engine.scheduler.pace.for_arena = lambda *, awaited: 0.0  # type: ignore[method-assign]

    def finish_loads(self) -> None:
        """Read what the engine asked to be read."""
        while self.loads:
            held = self.loads.pop(0)
            self.engine.host_loaded(held.adapter_id, held.load_from())

    def step(self) -> bool:
        """One step, and its outputs."""
        worked = self.engine.step()
        self.outputs += self.engine.requests.take_outputs()
        return worked

    def run(self, steps: int = 5000) -> None:
        """Run until nothing is left; fails if that takes more than ``steps``."""
        for _ in range(steps):
            if not len(self.engine.requests):
                break
            worked = self.step()
            assert worked or self.loads, "nothing can be computed, yet requests wait"
            self.finish_loads()
        assert not len(self.engine.requests), "requests never ended"
        self.outputs += self.engine.requests.take_outputs()
        self.engine.check_integrity()

    def tokens(self, request_id: str, index: int = 0) -> list[int]:
        """All tokens that a choice was given."""
        return [t for o in self._of(request_id, index) for t in o.token_ids]

    def reason(self, request_id: str, index: int = 0) -> FinishReason:
        """How a choice ended; exactly once, with its last output."""
        reasons = [o.finish_reason for o in self._of(request_id, index)]
        ends = [reason for reason in reasons if reason is not None]
        assert len(ends) == 1, f"{request_id} ended {len(ends)} times"
        assert reasons[-1] is ends[0], "outputs after the end"
        return ends[0]

    def error(self, request_id: str, index: int = 0) -> Exception | None:
        """What the client of a failed choice is told."""
        return self._of(request_id, index)[-1].error

    def _of(self, request_id: str, index: int) -> list[SequenceOutput]:
        return [o for o in self.outputs if (o.request_id, o.index) == (request_id, index)]


def make_engine(
    pools: Pools,
    model: FakeModel,
    arena: FakeArena,
    letters: Letters,
    load: Callable[[HeldAdapter], None],
    observer: Recorder,
) -> Engine:
    limits = SchedulerLimits(
        pools.max_running,
        pools.max_step_tokens,
        pools.adapter_timeout,
        pools.max_overtakes,
        pools.max_step_context,
    )
    settings = EngineSettings(
        vocab_size=VOCAB,
        num_blocks=pools.blocks,
        block_size=pools.block_size,
        arena_rows=pools.rows,
        host_bytes=pools.host_bytes,
        row_bytes=dict.fromkeys(LORA_MODULES, 16),
        limits=limits,
    )
    device = torch.device("cpu")
    return Engine(model, arena, letters, frozenset(), settings, device, load, observer)


def expected_mean(
    prompt: Sequence[int], adapters: Sequence[tuple[int, float]] = (), start: int = 0
) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
    """The states of the prompt's tokens from ``start`` on pooled by their mean, computed alone."""
    marked = [t + 64 * mark_of(adapters) for t in prompt]
    states = [next_logits(marked[: end + 1]).astype(np.float64) for end in range(start, len(prompt))]
    total = np.zeros(VOCAB)
    for state in states:
        total += state
    mean: np.ndarray[tuple[int], np.dtype[np.float32]] = (total / len(states)).astype(np.float32)
    return mean


def ask(
    request_id: str,
    prompt: Sequence[int],
    count: int = 5,
    adapters: Sequence[tuple[int, float]] = (),
    n: int = 1,
    sampling: SamplingParams | None = None,
    origin: str = "",
) -> GenerationRequest:
    """A greedy request that ends by length."""
    chosen = sampling or SamplingParams(temperature=0.0, max_tokens=count)
    return GenerationRequest(
        request_id, tuple(prompt), chosen, tuple(adapters), f"label-{request_id}", n, time.monotonic(), origin
    )
