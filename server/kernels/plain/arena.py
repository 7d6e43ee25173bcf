"""The plain backend's rank arena: two tensors a layer and module."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.adapters.types import AdapterWeights
from manylora.adapters.vocabulary import VOCABULARY
from manylora.server.kernels.output_rows import OutputRows, outputs_of
from manylora.server.kernels.pieces import WholeChanges, moved, pieces
from manylora.server.kernels.plain.memory import zeros
from manylora.server.kernels.shape import DecoderShape
from manylora.server.kernels.step import AdapterRanges, RankRange
from manylora.server.kernels.vocabularies import Vocabularies

SHARING = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""LORA_MODULES by the input that they have in common."""


@dataclass(frozen=True, slots=True)
class ArenaLayer:
    """A layer's buffers."""

    pairs: Mapping[str, tuple[Tensor, Tensor]]
    """By module A [rows, in] and B [rows, out], the scale folded into B."""
    stacks: Mapping[str, Tensor]
    """By the first module of each of SHARING: the A of them all, [modules · rows, in], whose parts ``pairs`` names."""


class PlainArena(WholeChanges):
    """See RankArena."""

    def __init__(self, shape: DecoderShape, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = rows
        self._paths = shape.paths
        self.layers = tuple(_layer(shape, rows, dtype, device) for _ in range(shape.num_layers))
        self.output_rows = OutputRows(shape.modules)
        self.vocabularies = Vocabularies(device)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        own = sum(a.nbytes + b.nbytes for layer in self.layers for a, b in layer.pairs.values())
        return own + self.vocabularies.nbytes

    def writing(self, ranges: AdapterRanges, weights: AdapterWeights) -> Iterator[None]:
        """Copy an adapter into its ranges, piece by piece; rows that a layer doesn't use become zero.

        From pinned memory nothing waits for a copy; the steps that follow do.
        """
        ranges = self.vocabularies.take(ranges, weights.vocabulary)
        self.output_rows.written(ranges, weights)
        for buffers, paths in zip(self.layers, self._paths, strict=True):
            for module, owned in ranges.items():
                pair = weights.pairs.get(paths[module])
                used = 0 if pair is None else pair.a.shape[0]
                for index, buffer in enumerate(buffers.pairs[module]):
                    rows = buffer[owned.start : owned.start + owned.rank]
                    if pair is not None:
                        factor = pair.b if index else pair.a
                        for piece in pieces(used, factor.nbytes):
                            rows[piece].copy_(factor[piece], non_blocking=True)
                            yield
                    if used < owned.rank:
                        rows[used:].zero_()
                        yield
                for row, values in outputs_of(self.output_rows, module, owned, paths[module], weights):
                    buffers.pairs[module][1][row].copy_(values)
                    yield

    def moving(self, module: str, source: RankRange, target_start: int) -> Iterator[None]:
        """Move a range to another start, piece by piece; until the last one it is nowhere whole."""
        if module == VOCABULARY:
            self.vocabularies.move(source, target_start)
            return
        self.output_rows.moved(module, source, target_start)
        by = target_start - source.start
        for buffers in self.layers:
            for buffer in buffers.pairs[module]:
                for rows in moved(source.rank, source.rank * buffer[0].nbytes, down=by < 0):
                    first, last = source.start + rows.start, source.start + rows.stop
                    buffer[first + by : last + by] = buffer[first:last].clone()
                    yield

    def release(self, ranges: AdapterRanges) -> None:
        """See RankArena."""
        self.vocabularies.let_go(ranges)


def _layer(shape: DecoderShape, rows: int, dtype: torch.dtype, device: torch.device) -> ArenaLayer:
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    stacks: dict[str, Tensor] = {}
    for modules in SHARING:
        wide = shape.modules[modules[0]][1]
        stacks[modules[0]] = stack = zeros((len(modules) * rows, wide), dtype, device)
        for number, module in enumerate(modules):
            a = stack[number * rows : (number + 1) * rows]
            pairs[module] = a, zeros((rows, shape.modules[module][0]), dtype, device)
    return ArenaLayer(pairs, stacks)


def bytes_per_row(shape: DecoderShape, dtype: torch.dtype) -> dict[str, int]:
    """Return what one rank row of each module takes over all layers."""
    each = shape.num_layers * dtype.itemsize
    return {module: each * (out + wide) for module, (out, wide) in shape.modules.items()}
