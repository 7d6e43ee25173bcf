"""The adapters of a step that only decodes, as one table of fixed size: so a GPU's work is the same whoever is in it.

lora.py lays out what a step uses, as tightly as that can be; this here fits the next step too. Each row has a weight
for each column, and each column is a rank row of the arena: all of a small arena's, or those in use and some to spare.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from manylora.server.kernels.output_rows import OutputRows
from manylora.server.kernels.plain.arena import SHARING, ArenaLayer
from manylora.server.kernels.plain.invariance import UNLIMITED, MatmulLimits
from manylora.server.kernels.plain.lora import NO_OUTPUTS, Slices, add_product, product
from manylora.server.kernels.plain.output_table import OutputTable, TableOutputs, Uses
from manylora.server.kernels.step import LORA_MODULES, Floats, Ints, RankRange, StepAdapters

LEAST_COLUMNS, MOST_COLUMNS = 16, 2048
WHOLE_ROWS = 256
"""An arena of up to so many rows is multiplied as it is: that takes less than gathering its rows."""


@dataclass(frozen=True, slots=True)
class TableForm:
    """What tables have in common that the same recorded work can read."""

    modules: tuple[str, ...]
    """Those that some adapter targets, in LORA_MODULES' order; none: all rows are the base's."""
    columns: int
    whole: bool
    """Whether the columns are all rows of the arena, in order."""
    weighted: bool
    """Whether there are weights other than 1."""
    outputs: tuple[int, int] = (0, 0)
    """See OutputTable.terms."""


@dataclass(frozen=True, slots=True)
class LoraTable:
    """A step's adapters, on the host."""

    form: TableForm
    rows: Ints
    """[modules, columns]: each column's row in the arena."""
    weights: Floats
    """[B, modules, columns]: 0 where a row doesn't use a column."""
    outputs: OutputTable


def lay_out_table(
    adapters: StepAdapters, arena_rows: int, limits: MatmulLimits, output_rows: OutputRows = NO_OUTPUTS
) -> LoraTable | None:
    """Return the table of a step's adapters; None: its sums take more than one product of such a size.

    ``output_rows``: which rows of the arena hold no factors.
    """
    count = len(adapters.start) - 1
    owning = {module: list(_uses(adapters, module)) for module in LORA_MODULES}
    modules = tuple(module for module in LORA_MODULES if owning[module])
    uses = {
        module: [
            (row, factors, weight)
            for row, owned, weight in each
            if (factors := output_rows.factors(module, owned)).rank
        ]
        for module, each in owning.items()
    }
    if limits is not UNLIMITED and not all(_rises(uses[module]) for module in modules):
        return None
    used = {module: sorted({owned for _, owned, _ in uses[module]}, key=_start) for module in modules}
    whole = limits.least_columns <= arena_rows <= min(WHOLE_ROWS, limits.most_depth) and all(
        owned.start % limits.grain == 0 for ranges in used.values() for owned in ranges
    )
    places = {module: _places(ranges, whole, limits.grain) for module, ranges in used.items()}
    columns = arena_rows if whole else _columns([end for _, end in places.values()])
    if columns > min(MOST_COLUMNS, limits.most_depth):
        return None
    rows = np.zeros((len(modules), columns), dtype=np.int32)
    weights = np.zeros((count, len(modules), columns), dtype=np.float32)
    for number, module in enumerate(modules):
        at, _ = places[module]
        for owned, first in at.items():
            rows[number, first : first + owned.rank] = np.arange(owned.start, owned.start + owned.rank)
        for row, owned, weight in uses[module]:
            weights[row, number, at[owned] : at[owned] + owned.rank] = weight
    weighted = bool((adapters.weights != 1).any())
    outputs = OutputTable.of([owning[module] for module in modules], modules, output_rows, count)
    form = TableForm(modules, columns if modules else 0, whole, weighted, outputs.terms)
    return LoraTable(form, rows, weights, outputs)


def _uses(adapters: StepAdapters, module: str) -> Iterator[tuple[int, RankRange, float]]:
    which, weights = adapters.which.tolist(), adapters.weights.tolist()
    for row, (first, last) in enumerate(pairwise(adapters.start.tolist())):
        for number, weight in zip(which[first:last], weights[first:last], strict=True):
            owned = adapters.ranges[number].get(module)
            if owned is not None and weight:
                yield row, owned, weight


def _rises(uses: Uses) -> bool:
    """Whether each row's ranges are summed in the order in which they lie in the arena."""
    return all(a.start < b.start for (one, a, _), (other, b, _) in pairwise(uses) if one == other)


def _start(owned: RankRange) -> int:
    return owned.start


def _places(ranges: Sequence[RankRange], whole: bool, grain: int) -> tuple[dict[RankRange, int], int]:
    """Return the first column of each range, and where the last one ends."""
    if whole:
        return {owned: owned.start for owned in ranges}, 0
    places: dict[RankRange, int] = {}
    end = 0
    for owned in ranges:
        places[owned] = -(-end // grain) * grain
        end = places[owned] + owned.rank
    return places, end


def _columns(ends: Sequence[int]) -> int:
    """Return a power of two that holds them all, so that few forms do."""
    return max(LEAST_COLUMNS, 1 << (max(ends, default=0) - 1).bit_length())


@dataclass(frozen=True, slots=True)
class TableLora:
    """A table on the device; see StepLora."""

    form: TableForm
    rows: Tensor
    """int32 [modules, columns]"""
    stacked: Mapping[str, Tensor]
    """Of modules whose A lie in one stack of the arena, by the first: their rows there, int32 [modules · columns]."""
    kept: Tensor
    """Integers as wide as the dtype, [n, modules, columns]: all bits where a row uses a column, none where not."""
    weights: Tensor | None
    """float32 [n, modules, columns]; None if none is other than 1."""
    outputs: TableOutputs
    least_size: int
    """See MatmulLimits."""

    @classmethod
    def of(
        cls,
        form: TableForm,
        rows: Tensor,
        weights: Tensor,
        outputs: TableOutputs,
        arena_rows: int,
        dtype: torch.dtype,
        limits: MatmulLimits,
    ) -> "TableLora":
        """Derive it from a table's arrays on the device."""
        stacked: dict[str, Tensor] = {}
        for modules in SHARING:
            if not form.whole and set(modules) <= set(form.modules):
                first = form.modules.index(modules[0])
                begins = torch.arange(len(modules), device=rows.device, dtype=rows.dtype) * arena_rows
                stacked[modules[0]] = (rows[first : first + len(modules)] + begins[:, None]).view(-1)
        kept = (weights != 0).to({2: torch.int16, 4: torch.int32}[dtype.itemsize]).neg_()
        weighted = weights if form.weighted else None
        return cls(form, rows, stacked, kept, weighted, outputs, limits.least_size)

    def add_slices(
        self, arena: ArenaLayer, x: Tensor, fused: Tensor, slices: Slices, bias: Tensor | None
    ) -> None:
        """See StepLora. Modules that lie in one stack of the arena have one product for all their A."""
        present = [each for each in slices if each[0] in self.form.modules]
        if any(self.form.outputs):
            for module, begin, end in present:
                own = None if bias is None else bias[begin:end]
                number = self.form.modules.index(module)
                self.outputs.apply(number, arena.pairs[module][1], own, fused[:, begin:end])
        if present and len(present) == len(slices):
            first = slices[0][0]
            self._add(arena, arena.stacks[first], self.stacked.get(first), x, fused, slices)
            return
        for each in present:
            module = each[0]
            rows = None if self.form.whole else self.rows[self.form.modules.index(module)]
            self._add(arena, arena.pairs[module][0], rows, x, fused, [each])

    def _add(
        self, arena: ArenaLayer, a: Tensor, rows: Tensor | None, x: Tensor, fused: Tensor, slices: Slices
    ) -> None:
        """Add the deltas of modules whose A are ``rows`` of ``a``, or all of it."""
        first, columns = self.form.modules.index(slices[0][0]), self.form.columns
        own = slice(first, first + len(slices))
        shrunk = product(x, a if rows is None else a.index_select(0, rows), self.least_size)
        shrunk.view(self.kept.dtype).bitwise_and_(self.kept[:, own].flatten(1))
        if self.weights is not None:
            shrunk.mul_(self.weights[:, own].flatten(1))
        for number, (module, begin, end) in enumerate(slices):
            b = arena.pairs[module][1]
            if rows is not None:
                b = b.index_select(0, self.rows[first + number])
            part = shrunk[:, number * columns : (number + 1) * columns]
            add_product(fused[:, begin:end], part, b, self.least_size)


def padded_weights(weights: Floats, count: int) -> npt.NDArray[np.float32]:
    """Return a table's weights [B, …] for ``count`` rows, those past B the base's."""
    return np.concatenate((weights, np.zeros((count - len(weights), *weights.shape[1:]), dtype=np.float32)))
