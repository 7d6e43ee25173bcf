"""Grouped LoRA in plain torch: a batch of many adapters is the same few matmuls as a batch of one.

The A rows of the adapters that a block of tokens uses are gathered into one matrix, and a mask says which of them
each token uses, and with which weight. Nothing is padded to a rank; mixtures and mixed ranks need no care. What is
derived from a step's spans is made once per step and shared by all layers.

What a token's product with another's A gives is thrown away, not multiplied by 0: it may be infinite, and 0 × inf is
NaN. What then meets another's B is a true 0, and B is finite: adapters that aren't so in the served dtype are refused
when they are read (manylora.adapters.reader).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from manylora.server.kernels.output_rows import OutputRows
from manylora.server.kernels.plain.arena import ArenaLayer
from manylora.server.kernels.plain.invariance import MatmulLimits, limits_on
from manylora.server.kernels.plain.outputs import OutputBlock, build_outputs
from manylora.server.kernels.step import LORA_MODULES, LoraSpan, RankRange

# A product of its own costs a span three calls; up to this many elements of mask they cost more than zeros do.
SHARED_MASK = 4096
NO_OUTPUTS = OutputRows(LORA_MODULES)
Slices: TypeAlias = Sequence[tuple[str, int, int]]
"""Modules, in the order of LORA_MODULES, and their columns of a projection that they share: (module, first, last)."""


@dataclass(frozen=True, slots=True)
class LoraBlock:
    """y[t] += (weights[t] · (x[t] Aᵀ where t uses the row, else 0)) B for tokens first ≤ t < last."""

    first: int
    last: int
    rows: slice | Tensor
    """The arena rows in use, R of them: a slice where they are adjacent (no copy), else int64 [R]."""
    kept: Tensor | None
    """Integers as wide as the dtype, [last − first, R]: all bits where a token uses a row, none where it doesn't. None
    if every token uses every row."""
    weights: Tensor | None
    """float32 [last − first, R], whatever the dtype: the weight with which a token uses a row, 0 where it doesn't.
    None if all weights are 1; rows of weight 1 among others are multiplied by exactly that, and keep their bits."""
    pieces: tuple[tuple[int, int], ...]
    """Columns of the mask that are summed by one product, in order; columns between them are nobody's. A token's
    adapters are summed in as few pieces as hold them, each in the order of the mixture, whoever else is in the
    batch."""
    least_size: int
    """Smaller products are made larger by rows of zeros: see MatmulLimits."""

    def add(self, x: Tensor, a: Tensor, b: Tensor, out: Tensor) -> None:
        """Add the deltas to ``out`` [T, n] in place; x [T, in], a [rows, in], b [rows, n]."""
        shrunk = product(x[self.first : self.last], a[self.rows], self.least_size)
        if self.kept is not None:
            # On the bits: it costs what a product would, half of masked_fill_.
            shrunk.view(self.kept.dtype).bitwise_and_(self.kept)
        if self.weights is not None:
            # In float32, rounded once: 0.7 is no bfloat16, and 100,000 no float16. So a weight is the same in every
            # dtype, and its error is that of one product, not one that all products share.
            shrunk.mul_(self.weights)
        target, wide = out[self.first : self.last], b[self.rows]
        for start, stop in self.pieces:
            add_product(target, shrunk[:, start:stop], wide[start:stop], self.least_size)


@dataclass(frozen=True, slots=True)
class LoraMetadata:
    """What a step's LoRA needs, by module; modules that no adapter of the step targets are absent."""

    modules: dict[str, tuple[LoraBlock, ...]]
    outputs: dict[str, tuple[OutputBlock, ...]] = field(default_factory=dict)
    """What is done to modules' own outputs first."""

    def add(self, module: str, x: Tensor, a: Tensor, b: Tensor, out: Tensor) -> None:
        """Add the module's deltas for x [T, in] to ``out`` [T, n]; a [rows, in] and b [rows, n] are a layer's."""
        for block in self.modules.get(module, ()):
            block.add(x, a, b, out)

    def add_slices(
        self, arena: ArenaLayer, x: Tensor, fused: Tensor, slices: Slices, bias: Tensor | None
    ) -> None:
        """See StepLora."""
        for module, first, last in slices:
            a, b = arena.pairs[module]
            for block in self.outputs.get(module, ()):
                block.apply(b, None if bias is None else bias[first:last], fused[:, first:last])
            self.add(module, x, a, b, fused[:, first:last])


@dataclass(frozen=True, slots=True)
class _Use:
    """A span's tokens and the arena rows that it uses in one module."""

    first: int
    last: int
    ranges: tuple[tuple[RankRange, float], ...]


def build_lora_metadata(
    spans: Sequence[LoraSpan],
    num_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    output_rows: OutputRows = NO_OUTPUTS,
) -> LoraMetadata | None:
    """Return the metadata of a step of ``num_tokens`` rows, padding included, or None if it is all base.

    Spans are in the order of their tokens; ``output_rows`` are the arena's. Modules in which the
    step owns the same ranges share one object.
    """
    limits = limits_on(device, dtype)
    modules: dict[str, tuple[LoraBlock, ...]] = {}
    built: dict[tuple[_Use, ...], tuple[LoraBlock, ...]] = {}
    for module in LORA_MODULES:
        uses = tuple(_uses(spans, module, output_rows))
        if not uses:
            continue
        if uses not in built:
            groups = _groups(uses)
            built[uses] = tuple(_block(group, num_tokens, device, dtype, limits) for group in groups)
        modules[module] = built[uses]
    outputs = build_outputs(spans, output_rows, device)
    return LoraMetadata(modules, outputs) if modules or outputs else None


def _uses(spans: Sequence[LoraSpan], module: str, output_rows: OutputRows) -> Iterator[_Use]:
    for span in spans:
        ranges = tuple(
            (factors, weight)
            for owned, weight in span.adapters
            if module in owned and (factors := output_rows.factors(module, owned[module])).rank
        )
        if ranges and span.length:
            yield _Use(span.start, span.start + span.length, ranges)


def _groups(uses: Sequence[_Use]) -> Iterator[list[_Use]]:
    """Part the spans: neighbours share a mask unless that would mostly multiply by zeros, as long prompts do."""
    group: list[_Use] = []
    ranges: set[RankRange] = set()
    for use in uses:
        own = {owned for owned, _ in use.ranges}
        if group:
            apart = (group[-1].last - group[0].first) * _rank(ranges) + (use.last - use.first) * _rank(own)
            if (use.last - group[0].first) * _rank(ranges | own) > apart + SHARED_MASK:
                yield group
                group, ranges = [], set()
        group.append(use)
        ranges |= own
    yield group


def _rank(ranges: set[RankRange]) -> int:
    return sum(owned.rank for owned in ranges)


def _block(
    uses: Sequence[_Use], num_tokens: int, device: torch.device, dtype: torch.dtype, limits: MatmulLimits
) -> LoraBlock:
    # Few tokens take their neighbours along, which add zeros to themselves: see MatmulLimits.
    first = max(0, min(uses[0].first, num_tokens - limits.least_rows))
    last = min(num_tokens, max(uses[-1].last, first + limits.least_rows))
    layout = _Layout(limits)
    groups = [_parted(use.ranges, limits) for use in uses]
    for level in range(max(map(len, groups))):
        layout.lay(level, [each[level][0] for each in groups if level < len(each)])
    width = max(layout.end, limits.least_columns)
    mask = torch.zeros(last - first, width)
    for use, parted in zip(uses, groups, strict=True):
        for level, (ranges, weights) in enumerate(parted):
            for owned, column, weight in zip(ranges, layout.columns[level, ranges], weights, strict=True):
                mask[use.first - first : use.last - first, column : column + owned.rank] = weight
    pieces = layout.pieces
    pieces[-1] = (pieces[-1][0], width)
    rows = _arena_rows(layout.laid, width, device)
    least_size = limits.least_size if device.type == "cpu" else 0
    return LoraBlock(first, last, rows, *_kept_and_weights(mask, device, dtype), tuple(pieces), least_size)


def product(x: Tensor, a: Tensor, least_size: int) -> Tensor:
    """Return x Aᵀ, [n, R]."""
    missing = -(-least_size // a.numel()) - x.shape[0]
    if missing <= 0:
        return F.linear(x, a)
    return F.linear(F.pad(x, (0, 0, 0, missing)), a)[: x.shape[0]]


def add_product(target: Tensor, shrunk: Tensor, b: Tensor, least_size: int) -> None:
    """Add ``shrunk`` B to ``target`` [n, out] in place."""
    missing = -(-least_size // b.numel()) - shrunk.shape[0]
    if missing <= 0:
        target.addmm_(shrunk, b)
        return
    more = (0, 0, 0, missing)
    target.copy_(torch.addmm(F.pad(target, more), F.pad(shrunk, more), b)[: shrunk.shape[0]])


_Ranges = tuple[RankRange, ...]


def _parted(
    used: Sequence[tuple[RankRange, float]], limits: MatmulLimits
) -> list[tuple[_Ranges, tuple[float, ...]]]:
    """Part what a span uses into as few groups as one product each can sum, in order; by that alone, not by others."""
    groups: list[list[tuple[RankRange, float]]] = []
    room = 0
    for owned, weight in used:
        if not groups or _wide(owned, limits) > room:
            groups.append([])
            room = limits.most_depth
        groups[-1].append((owned, weight))
        room -= _wide(owned, limits)
    return [(tuple(r for r, _ in group), tuple(weight for _, weight in group)) for group in groups]


def _wide(owned: RankRange, limits: MatmulLimits) -> int:
    """Return how many columns a range takes, for the next one to begin where it may."""
    return -(-owned.rank // limits.grain) * limits.grain


class _Layout:
    """Columns of a mask: groups of ranges laid side by side, those of a group in its order and in one piece.

    Only a range longer than a piece is cut.
    """

    def __init__(self, limits: MatmulLimits) -> None:
        self._limits = limits
        self._next = 0
        self.end = 0
        self.columns: dict[tuple[int, _Ranges], tuple[int, ...]] = {}
        """The first column of each range, by its group and whether that is a span's first, second and so on."""
        self.laid: list[tuple[RankRange, int]] = []
        """Ranges with their first columns."""
        self.pieces: list[tuple[int, int]] = []

    def lay(self, level: int, groups: Sequence[_Ranges]) -> None:
        """Lay groups whose sums are added at the same time.

        Those whose ranges lie in the order of their rows share pieces, and so do those that lie the other way round:
        so all keep their order. Any others have a piece each.
        """
        rising: list[_Ranges] = []
        falling: list[_Ranges] = []
        others: list[_Ranges] = []
        for group in dict.fromkeys(groups):
            steps = [b.start - a.start for a, b in pairwise(group)]
            rises, falls = all(step > 0 for step in steps), all(step < 0 for step in steps)
            (rising if rises else falling if falls else others).append(group)
        for shared, backwards in ((rising, False), (falling, True)):
            for together in self._packed(sorted(shared, key=lambda group: group[0].start)):
                found = {owned for group in together for owned in group}
                self._lay(level, sorted(found, key=lambda each: each.start, reverse=backwards), together)
        for group in others:
            self._lay(level, group, [group])

    def _packed(self, groups: Sequence[_Ranges]) -> Iterator[list[_Ranges]]:
        """Part groups into those that one piece holds."""
        packed: list[_Ranges] = []
        found: set[RankRange] = set()
        width = 0
        for group in groups:
            more = sum(_wide(owned, self._limits) for owned in group if owned not in found)
            if packed and width + more > self._limits.most_depth:
                yield packed
                packed, found, width = [], set(), 0
                more = sum(_wide(owned, self._limits) for owned in group)
            packed.append(group)
            found.update(group)
            width += more
        if packed:
            yield packed

    def _lay(self, level: int, ranges: Sequence[RankRange], groups: Sequence[_Ranges]) -> None:
        """Lay ranges into one piece, which their groups share."""
        start, most = self._next, self._limits.most_depth
        places: list[int] = []
        for owned in ranges:
            places.append(self._next)
            self.laid.append((owned, self._next))
            self.end = self._next + owned.rank
            self._next += _wide(owned, self._limits)
        while self.end - start > most:
            self.pieces.append((start, start + most))
            start += most
        self.pieces.append((start, self.end))
        at = dict(zip(ranges, places, strict=True))
        for group in groups:
            same = len(at) < len(ranges)
            self.columns[level, group] = tuple(places) if same else tuple(at[owned] for owned in group)


def _kept_and_weights(
    mask: Tensor, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Part a mask, float32 [n, R] with 0 for what a token doesn't use, into LoraBlock's ``kept`` and ``weights``."""
    used = mask != 0
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    kept = None if bool(used.all()) else used.to(bits).neg_().to(device)
    weighted = bool((used & (mask != 1)).any())
    return kept, mask.to(device) if weighted else None


def _arena_rows(laid: Sequence[tuple[RankRange, int]], width: int, device: torch.device) -> slice | Tensor:
    """Return the row of each column; those that nobody uses name the first range's first row, or any within a slice."""
    first, column = laid[0]
    last, end = laid[-1]
    adjacent = all(owned.start - at == first.start - column for owned, at in laid)
    if adjacent and end + last.rank == width:
        return slice(first.start, first.start + width)
    rows = np.full(width, first.start)
    for owned, at in laid:
        rows[at : at + owned.rank] = np.arange(owned.start, owned.start + owned.rank)
    return torch.from_numpy(rows).to(device)
