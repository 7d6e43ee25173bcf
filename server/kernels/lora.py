"""Grouped LoRA in plain torch: a batch of many adapters is the same few matmuls as a batch of one.

The A rows of all adapters that a step uses are gathered into one matrix, and a mask says which of them each token
uses, and with which weight. Nothing is padded; each A and B is read once; mixtures and mixed ranks need no care.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from server.kernels.metadata import LORA_MODULES, AdapterRanges, LoraSpan, RankRange

# Past this many gathered rows a long prompt would mostly multiply by zeros: adapters then take turns.
MASKED_ROWS = 256


@dataclass(frozen=True, slots=True)
class MaskedRows:
    """Every adapter at once: S = x Aᵀ, masked, then y += S B."""

    rows: slice | Tensor
    """The arena rows in use, R of them: a slice where they are adjacent (no copy), else int64 [R]."""
    mask: Tensor
    """[T, R]: the weight with which a token uses a row; 0 for rows of other adapters."""

    def add(self, x: Tensor, a: Tensor, b: Tensor, out: Tensor) -> None:
        """Add this step's deltas to ``out`` [T, n] in place; x [T, in], a [rows, in], b [rows, n]."""
        shrunk = F.linear(x, a[self.rows]).mul_(self.mask)
        out.addmm_(shrunk, b[self.rows])


@dataclass(frozen=True, slots=True)
class SegmentedRows:
    """One adapter after the other, each on its own tokens, for long prompts of many adapters."""

    segments: tuple[tuple[int, int, RankRange, float], ...]
    """(first token, tokens, arena rows, weight)"""
    least_rows: int
    """Fewest rows of a matmul whose bits don't depend on the number of rows; see PlainBackend."""

    def add(self, x: Tensor, a: Tensor, b: Tensor, out: Tensor) -> None:
        """Add this step's deltas to ``out`` [T, n] in place; x [T, in], a [rows, in], b [rows, n]."""
        for start, length, owned, weight in self.segments:
            rows = slice(owned.start, owned.start + owned.rank)
            tokens = x[start : start + length]
            if length < self.least_rows:
                tokens = F.pad(tokens, (0, 0, 0, self.least_rows - length))
            delta = F.linear(tokens, a[rows]).mul_(weight) @ b[rows]
            out[start : start + length] += delta[:length]


ModuleRows = MaskedRows | SegmentedRows


@dataclass(frozen=True, slots=True)
class LoraMetadata:
    """What a step's LoRA needs, by module; modules that no adapter of the step targets are absent."""

    modules: dict[str, ModuleRows]


@dataclass(frozen=True, slots=True)
class LayerLora:
    """A step's metadata together with one layer's arena buffers: what an op of that layer is given."""

    metadata: LoraMetadata
    buffers: dict[str, tuple[Tensor, Tensor]]
    """Module to (A [rows, in], B [rows, out])."""

    def add(self, module: str, x: Tensor, out: Tensor) -> None:
        """Add the module's deltas for ``x`` [T, in] to ``out`` [T, out_features] in place."""
        rows = self.metadata.modules.get(module)
        if rows is not None:
            a, b = self.buffers[module]
            rows.add(x, a, b, out)


def build_lora_metadata(
    spans: Sequence[LoraSpan], num_tokens: int, device: torch.device, dtype: torch.dtype, least_rows: int
) -> LoraMetadata | None:
    """Return the metadata of a step of ``num_tokens`` rows, padding included, or None if it is all base.

    ``least_rows``: Backend.least_rows. Modules in which every adapter owns the same ranges share one object.
    """
    modules: dict[str, ModuleRows] = {}
    built: dict[tuple[RankRange | None, ...], ModuleRows] = {}
    uses = [(span, ranges, weight) for span in spans for ranges, weight in span.adapters]
    for module in LORA_MODULES:
        owned = tuple(ranges.get(module) for _, ranges, _ in uses)
        if not any(owned):
            continue
        if owned not in built:
            built[owned] = _module_rows(uses, module, num_tokens, device, dtype, least_rows)
        modules[module] = built[owned]
    return LoraMetadata(modules) if modules else None


Use = tuple[LoraSpan, AdapterRanges, float]


def _module_rows(
    uses: Sequence[Use],
    module: str,
    num_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    least_rows: int,
) -> ModuleRows:
    segments = [
        (span.start, span.length, ranges[module], weight) for span, ranges, weight in uses if module in ranges
    ]
    offsets: dict[RankRange, int] = {}
    total = 0
    for owned in sorted({segment[2] for segment in segments}, key=lambda each: each.start):
        offsets[owned] = total
        total += owned.rank
    needed = sum(length * owned.rank for _, length, owned, _ in segments)
    if total > MASKED_ROWS and num_tokens * total > 4 * needed:
        return SegmentedRows(tuple(segments), least_rows)
    mask = torch.zeros(num_tokens, total, dtype=dtype)
    for start, length, owned, weight in segments:
        first = offsets[owned]
        mask[start : start + length, first : first + owned.rank] += weight
    return MaskedRows(_arena_rows(list(offsets), device), mask.to(device))


def _arena_rows(ranges: Sequence[RankRange], device: torch.device) -> slice | Tensor:
    first, last = ranges[0], ranges[-1]
    end = last.start + last.rank
    if end - first.start == sum(owned.rank for owned in ranges):
        return slice(first.start, end)
    return torch.cat([torch.arange(owned.start, owned.start + owned.rank) for owned in ranges]).to(device)
