"""A step as the kernels read it: arrays of int32, and for each module its adapters with the tokens that use them."""

import ctypes
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from manylora.server.kernels.cpu import abi
from manylora.server.kernels.cpu.arena import CpuArena
from manylora.server.kernels.cpu.kv_cache import CpuKVCache
from manylora.server.kernels.cpu.model import CpuModel
from manylora.server.kernels.cpu.own_embeddings import OwnEmbeddings
from manylora.server.kernels.output_rows import OutputRows
from manylora.server.kernels.plain.vocabulary import NO_VOCABULARY, StepVocabulary
from manylora.server.kernels.step import LORA_MODULES, AdapterRanges, Floats, Ints, StepBatch


class Op(IntEnum):
    """What the team runs: step.h's numbers."""

    EMBED = 0
    ATTN_IN = 1
    ATTEND = 2
    ATTN_OUT = 3
    MLP_IN = 4
    MLP_OUT = 5
    FORWARD = 6


JOB = np.dtype(
    [
        ("start", "i4"),
        ("rank", "i4"),
        ("count", "i4"),
        ("others", "i4"),
        ("tokens", "u8"),
        ("weights", "u8"),
        ("places", "u8"),
    ]
)
"""abi.Job."""
TERM = np.dtype([(name, "i4") for name in ("token", "start", "rank", "row", "kind")] + [("weight", "f4")])
"""abi.Term."""


@dataclass(frozen=True, slots=True)
class CpuPlan:
    """A step that has begun, and the arrays that its structure points into."""

    batch: StepBatch
    model: CpuModel
    kv: CpuKVCache
    arena: CpuArena
    finite: npt.NDArray[np.uint8]
    """[T]: 0 where keys or values that were written are not finite."""
    structure: abi.Step
    kept: tuple[Any, ...]
    vocabulary: StepVocabulary = NO_VOCABULARY

    @property
    def address(self) -> int:
        """Of the structure that kernels read."""
        return ctypes.addressof(self.structure)


def plan_step(
    model: CpuModel,
    batch: StepBatch,
    kv: CpuKVCache,
    arena: CpuArena,
    given: OwnEmbeddings | None = None,
) -> CpuPlan:
    """Lay out a step. What was laid out for this very batch is kept: it points to the arrays, whatever they say.

    ``given``: embeddings of tokens that aren't the model's; of such a step nothing is kept.
    """
    last = model.last_plan
    if last is not None and last.batch is batch and last.kv is kv and last.arena is arena:
        last.finite.fill(1)
        return last
    attention = batch.attention
    lists = (
        batch.token_ids,
        attention.positions,
        attention.slots,
        attention.query_start,
        attention.context_lens,
        attention.block_tables,
    )
    arrays = [np.ascontiguousarray(each, dtype=np.int32) for each in lists]
    finite = np.ones(len(arrays[0]), dtype=np.uint8)
    names = ("ids", "positions", "slots", "query_start", "context_lens", "block_tables")
    structure = abi.Step(
        tokens=len(arrays[0]),
        sequences=len(attention.context_lens),
        table_width=attention.block_tables.shape[1],
        finite=finite.ctypes.data,
        given=None if given is None else given.addresses.ctypes.data,
        **{name: array.ctypes.data for name, array in zip(names, arrays, strict=True)},
    )
    jobs = step_jobs(model, batch, arena.output_rows)
    structure.jobs = jobs.structures
    own = NO_VOCABULARY if given is None else given.vocabulary
    plan = CpuPlan(batch, model, kv, arena, finite, structure, (arrays, jobs, given), own)
    # A copy wouldn't change with what it was made of.
    model.last_plan = plan if given is None and all(map(operator.is_, arrays, lists)) else None
    return plan


@dataclass(frozen=True, slots=True)
class StepJobs:
    """The adapters' jobs of a step, by module, and of what they were made."""

    ranges: tuple[AdapterRanges, ...]
    """Kept, so that no other mapping can be taken for one of these."""
    rows: tuple[bytes, ...]
    output_changes: int
    uses: "Uses | None"
    structures: "ctypes.Array[abi.Jobs]"


def step_jobs(model: CpuModel, batch: StepBatch, output_rows: OutputRows) -> StepJobs:
    """Return a step's jobs: those of the one before, where the same rows use the same adapters, as streams do."""
    adapters = batch.adapters
    arrays = (adapters.start, adapters.which, adapters.weights, batch.attention.query_start)
    rows = tuple(array.tobytes() for array in arrays)
    last = model.last_jobs
    # Mappings never change: an adapter that is moved gets another.
    same = last is not None and last.rows == rows and last.output_changes == output_rows.changes
    if last is not None and same and _same(last.ranges, adapters.ranges):
        return last
    uses = Uses.of(batch, output_rows)
    structures = (abi.Jobs * len(LORA_MODULES))(*(() if uses is None else uses.jobs()))
    model.last_jobs = StepJobs(adapters.ranges, rows, output_rows.changes, uses, structures)
    return model.last_jobs


@dataclass(frozen=True, slots=True)
class Uses:
    """Which tokens use which adapter. A token's adapters stand in the order in which it adds them."""

    ranges: npt.NDArray[np.int32]
    """[uses, modules, 2]: start and rank; rank 0 where an adapter doesn't target a module."""
    counts: npt.NDArray[np.int64]
    """[uses]: tokens of each."""
    tokens: Ints
    """Of one use after the other."""
    weights: Floats
    outputs: npt.NDArray[np.int32]
    """[uses, modules, kinds]: which of an adapter's rows holds gains, and which offsets; −1: none does."""
    kept: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, batch: StepBatch, output_rows: OutputRows) -> "Uses | None":
        """Collect the tokens of each adapter; None if all are the base's.

        A token's first adapter comes before any token's second: so its order is its own, whoever else is there.
        """
        adapters, starts = batch.adapters, batch.attention.query_start
        counts = np.diff(adapters.start)
        rows = np.repeat(np.arange(len(counts)), counts)
        places = np.arange(len(rows)) - adapters.start[rows]
        lengths = np.diff(starts)[rows]
        if not lengths.any():
            return None
        order = np.lexsort((rows, adapters.which, places))
        keys = np.stack((places, adapters.which))[:, order]
        first = np.concatenate(([True], (np.diff(keys) != 0).any(axis=0)))
        lengths = lengths[order]
        of_use = np.add.reduceat(lengths, first.nonzero()[0])
        ends = np.cumsum(lengths)
        tokens = np.arange(ends[-1]) + np.repeat(starts[rows[order]] - ends + lengths, lengths)
        ranges = np.array([_ranges(owned) for owned in adapters.ranges], dtype=np.int32)
        outputs = np.array([_outputs(owned, output_rows) for owned in adapters.ranges], dtype=np.int32)
        adapter = adapters.which[order][first]
        return cls(
            ranges[adapter],
            of_use,
            tokens.astype(np.int32),
            np.repeat(adapters.weights[order], lengths),
            outputs[adapter],
        )

    def jobs(self) -> list[abi.Jobs]:
        """Return the jobs of each module."""
        return [self._of_module(index) for index in range(len(LORA_MODULES))]

    def _of_module(self, index: int) -> abi.Jobs:
        ranks = self.ranges[:, index, 1]
        widths = np.repeat(ranks, self.counts)
        ends = np.cumsum(widths, dtype=np.int32)
        places = np.ascontiguousarray(ends - widths, dtype=np.int32)
        firsts = np.cumsum(self.counts) - self.counts
        used = ranks > 0
        jobs = np.zeros(int(used.sum()), dtype=JOB)
        jobs["start"], jobs["rank"], jobs["count"] = (
            self.ranges[used, index, 0],
            ranks[used],
            self.counts[used],
        )
        jobs["others"] = (self.outputs[used, index] >= 0).sum(axis=-1)
        for name, array in (("tokens", self.tokens), ("weights", self.weights), ("places", places)):
            jobs[name] = array.ctypes.data + 4 * firsts[used]
        terms = self._terms(index)
        self.kept.extend((places, jobs, terms))
        return abi.Jobs(
            count=len(jobs),
            width=int(ends[-1]),
            job=jobs.ctypes.data,
            terms=len(terms),
            term=terms.ctypes.data if len(terms) else None,
        )

    def _terms(self, index: int) -> npt.NDArray[np.void]:
        """Return what adapters do to a module's output; a token's stand together, in its own order."""
        outputs = self.outputs[:, index]
        if (outputs < 0).all():
            return np.zeros(0, dtype=TERM)
        owner = np.repeat(np.arange(len(self.counts)), self.counts)
        found = []
        for kind in (abi.TERM_GAIN, abi.TERM_OFFSET):
            wanted = np.flatnonzero(outputs[owner, kind] >= 0)
            terms = np.zeros(len(wanted), dtype=TERM)
            terms["token"], terms["weight"], terms["kind"] = self.tokens[wanted], self.weights[wanted], kind
            terms["start"], terms["rank"] = self.ranges[owner[wanted], index].T
            terms["row"] = outputs[owner[wanted], kind]
            found.append(terms)
        every = np.concatenate(found)
        return every[every["token"].argsort(kind="stable")]


def _same(ones: Sequence[object], others: Sequence[object]) -> bool:
    return len(ones) == len(others) and all(map(operator.is_, ones, others))


def _outputs(ranges: AdapterRanges, output_rows: OutputRows) -> list[list[int]]:
    """Return of each module which rows of its range hold gains and offsets, counted within it; −1: none does."""
    found = []
    for module in LORA_MODULES:
        owned = ranges.get(module)
        rows = (
            (None, None)
            if owned is None
            else (output_rows.gain(module, owned), output_rows.offset(module, owned))
        )
        found.append([-1 if row is None or owned is None else row - owned.start for row in rows])
    return found


def _ranges(ranges: AdapterRanges) -> list[tuple[int, int]]:
    owned = (ranges.get(module) for module in LORA_MODULES)
    return [(0, 0) if each is None else (each.start, each.rank) for each in owned]
