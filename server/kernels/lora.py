"""Grouped LoRA in plain torch: a batch of many adapters is the same few matmuls as a batch of one.

The A rows of the adapters that a block of tokens uses are gathered into one matrix, and a mask says which of them
each token uses, and with which weight. Nothing is padded to a rank; mixtures and mixed ranks need no care. What is
derived from a step's spans is made once per step and shared by all layers.

What a token's product with another's A gives is thrown away, not multiplied by 0: it may be infinite, and 0 × inf is
NaN. What then meets another's B is a true 0, and B is finite: adapters that aren't so in the served dtype are refused
when they are read (manylora.adapters.reader).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from manylora.server.kernels.invariance import MATMUL_LIMITS, MatmulLimits
from manylora.server.kernels.metadata import LORA_MODULES, LoraSpan, RankRange

# A product of its own costs a span three calls; up to this many elements of mask they cost more than zeros do.
SHARED_MASK = 4096


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
    """Columns of the mask that are summed by one product, in order. An adapter is summed in as few pieces, and
    the adapters of a mixture one after the other, whoever else is in the batch."""
    least_size: int
    """Smaller products are made larger by rows of zeros: see MatmulLimits."""

    def add(self, x: Tensor, a: Tensor, b: Tensor, out: Tensor) -> None:
        """Add the deltas to ``out`` [T, n] in place; x [T, in], a [rows, in], b [rows, n]."""
        shrunk = _product(x[self.first : self.last], a[self.rows], self.least_size)
        if self.kept is not None:
            # On the bits: it costs what a product would, half of masked_fill_.
            shrunk.view(self.kept.dtype).bitwise_and_(self.kept)
        if self.weights is not None:
            # In float32, rounded once: 0.7 is no bfloat16, and 100,000 no float16. So a weight is the same in every
            # dtype, and its error is that of one product, not one that all products share.
            shrunk.mul_(self.weights)
        target, wide = out[self.first : self.last], b[self.rows]
        for start, stop in self.pieces:
            _add_product(target, shrunk[:, start:stop], wide[start:stop], self.least_size)


@dataclass(frozen=True, slots=True)
class LoraMetadata:
    """What a step's LoRA needs, by module; modules that no adapter of the step targets are absent."""

    modules: dict[str, tuple[LoraBlock, ...]]


@dataclass(frozen=True, slots=True)
class LayerLora:
    """A step's metadata together with one layer's arena buffers: what an op of that layer is given."""

    metadata: LoraMetadata
    buffers: dict[str, tuple[Tensor, Tensor]]
    """Module to (A [rows, in], B [rows, out])."""

    def add(self, module: str, x: Tensor, out: Tensor) -> None:
        """Add the module's deltas for ``x`` [T, in] to ``out`` [T, out_features] in place."""
        blocks = self.metadata.modules.get(module)
        if blocks is not None:
            a, b = self.buffers[module]
            for block in blocks:
                block.add(x, a, b, out)


@dataclass(frozen=True, slots=True)
class _Use:
    """A span's tokens and the arena rows that it uses in one module."""

    first: int
    last: int
    ranges: tuple[tuple[RankRange, float], ...]


def build_lora_metadata(
    spans: Sequence[LoraSpan], num_tokens: int, device: torch.device, dtype: torch.dtype
) -> LoraMetadata | None:
    """Return the metadata of a step of ``num_tokens`` rows, padding included, or None if it is all base.

    Spans are in the order of their tokens. Modules in which the step owns the same ranges share one object.
    """
    limits = MATMUL_LIMITS[dtype]
    modules: dict[str, tuple[LoraBlock, ...]] = {}
    built: dict[tuple[_Use, ...], tuple[LoraBlock, ...]] = {}
    for module in LORA_MODULES:
        uses = tuple(_uses(spans, module))
        if not uses:
            continue
        if uses not in built:
            groups = _groups(uses)
            built[uses] = tuple(_block(group, num_tokens, device, dtype, limits) for group in groups)
        modules[module] = built[uses]
    return LoraMetadata(modules) if modules else None


def _uses(spans: Sequence[LoraSpan], module: str) -> Iterator[_Use]:
    for span in spans:
        ranges = tuple((owned[module], weight) for owned, weight in span.adapters if module in owned)
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
    columns, chunks, pieces = _columns(uses, limits.most_depth)
    width = max(pieces[-1][1], limits.least_columns)
    mask = torch.zeros(last - first, width)
    for use in uses:
        for level, (owned, weight) in enumerate(use.ranges):
            column = columns[level, owned]
            mask[use.first - first : use.last - first, column : column + owned.rank] = weight
    pieces[-1] = (pieces[-1][0], width)
    rows = _arena_rows(chunks, width, device)
    least_size = limits.least_size if device.type == "cpu" else 0
    return LoraBlock(first, last, rows, *_kept_and_weights(mask, device, dtype), tuple(pieces), least_size)


def _product(x: Tensor, a: Tensor, least_size: int) -> Tensor:
    """Return x Aᵀ, [n, R]."""
    missing = -(-least_size // a.numel()) - x.shape[0]
    if missing <= 0:
        return F.linear(x, a)
    return F.linear(F.pad(x, (0, 0, 0, missing)), a)[: x.shape[0]]


def _add_product(target: Tensor, shrunk: Tensor, b: Tensor, least_size: int) -> None:
    """Add ``shrunk`` B to ``target`` [n, out] in place."""
    missing = -(-least_size // b.numel()) - shrunk.shape[0]
    if missing <= 0:
        target.addmm_(shrunk, b)
        return
    more = (0, 0, 0, missing)
    target.copy_(torch.addmm(F.pad(target, more), F.pad(shrunk, more), b)[: shrunk.shape[0]])


def _kept_and_weights(
    mask: Tensor, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Part a mask, float32 [n, R] with 0 for what a token doesn't use, into LoraBlock's ``kept`` and ``weights``."""
    used = mask != 0
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    kept = None if bool(used.all()) else used.to(bits).neg_().to(device)
    weighted = bool((used & (mask != 1)).any())
    return kept, mask.to(device) if weighted else None


def _columns(
    uses: Sequence[_Use], most: int
) -> tuple[dict[tuple[int, RankRange], int], list[RankRange], list[tuple[int, int]]]:
    """Lay the ranges side by side: the first adapter of every span, then the second of mixtures, and so on.

    Returns each range's first column by its place in the mixture, the ranges in order of columns, and the pieces.
    A piece holds ranges of one place only, and up to ``most`` columns; only a longer range is cut.
    """
    columns: dict[tuple[int, RankRange], int] = {}
    laid: list[RankRange] = []
    pieces: list[tuple[int, int]] = []
    end = 0
    for level in range(max(len(use.ranges) for use in uses)):
        start = end
        found = {use.ranges[level][0] for use in uses if level < len(use.ranges)}
        for owned in sorted(found, key=lambda each: each.start):
            if end > start and end + owned.rank - start > most:
                pieces.append((start, end))
                start = end
            columns[level, owned] = end
            laid.append(owned)
            end += owned.rank
            while end - start > most:
                pieces.append((start, start + most))
                start += most
        pieces.append((start, end))
    return columns, laid, pieces


def _arena_rows(ranges: Sequence[RankRange], width: int, device: torch.device) -> slice | Tensor:
    """Return the ranges' rows, the first one repeated up to ``width``."""
    first, last = ranges[0], ranges[-1]
    adjacent = all(a.start + a.rank == b.start for a, b in pairwise(ranges))
    if adjacent and last.start + last.rank - first.start == width:
        return slice(first.start, first.start + width)
    rows = np.concatenate([np.arange(owned.start, owned.start + owned.rank) for owned in ranges])
    return torch.from_numpy(np.pad(rows, (0, width - len(rows)), constant_values=first.start)).to(device)
