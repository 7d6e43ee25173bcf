"""The native backend's rank arena: bfloat16, all of an adapter in a row, B as the outputs' blocks of 32 are read."""

import ctypes
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from manylora.adapters.types import AdapterWeights
from manylora.adapters.vocabulary import VOCABULARY
from manylora.server.kernels.cpu import abi
from manylora.server.kernels.output_rows import OutputRows, outputs_of
from manylora.server.kernels.pieces import WholeChanges, moved, pieces
from manylora.server.kernels.plain.memory import zeros
from manylora.server.kernels.shape import DecoderShape
from manylora.server.kernels.step import LORA_MODULES, AdapterRanges, RankRange
from manylora.server.kernels.vocabularies import Vocabularies

CPU = torch.device("cpu")


class CpuArena(WholeChanges):
    """See RankArena. An adapter's range of a module's rank rows is its share of two buffers, for all layers.

    A is laid out [layers, rank, in] there and B, the scale folded in, [layers, ⌈out / 32⌉, rank, 32]: what one adapter
    needs lies together, in large pages, and rows that nobody has had take no memory.
    """

    def __init__(self, shape: DecoderShape, rows: int) -> None:
        self.rows = rows
        self._paths = shape.paths
        self.output_rows = OutputRows(shape.modules)
        layers = self._num_layers = shape.num_layers
        self._modules = {
            module: (
                zeros((rows, layers * wide), torch.bfloat16, CPU),
                zeros((rows, layers * _blocks(out) * abi.BLOCK), torch.bfloat16, CPU),
            )
            for module, (out, wide) in shape.modules.items()
        }
        self._pairs = (abi.Pair * len(LORA_MODULES))(
            *(
                abi.Pair(*(factor.data_ptr() for factor in self._modules[module]), 0, layers)
                for module in LORA_MODULES
            )
        )
        self.structure = abi.Arena(pair=ctypes.addressof(self._pairs))
        self.vocabularies = Vocabularies(CPU)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(a.nbytes + b.nbytes for a, b in self._modules.values()) + self.vocabularies.nbytes

    @property
    def address(self) -> int:
        """Of the structure that kernels read."""
        return ctypes.addressof(self.structure)

    def writing(self, ranges: AdapterRanges, weights: AdapterWeights) -> Iterator[None]:
        """Copy an adapter into its ranges, piece by piece; rows that a layer doesn't use become zero."""
        ranges = self.vocabularies.take(ranges, weights.vocabulary)
        self.output_rows.written(ranges, weights)
        for module, owned in ranges.items():
            every_a, every_b = self._shares(module, owned)
            for paths, own_a, own_b in zip(self._paths, every_a, every_b, strict=True):
                pair = weights.pairs.get(paths[module])
                used = 0 if pair is None else pair.a.shape[0]
                if pair is not None:
                    for rows in pieces(used, pair.a.nbytes):
                        own_a[rows] = pair.a[rows]
                        yield
                    for blocks in pieces(len(own_b), pair.b.nbytes):
                        columns = pair.b[:, blocks.start * abi.BLOCK : blocks.stop * abi.BLOCK]
                        own_b[blocks, :used] = _in_blocks(columns)
                        yield
                if used < owned.rank:
                    own_a[used:] = 0
                    own_b[:, used:] = 0
                    yield
                for row, values in outputs_of(self.output_rows, module, owned, paths[module], weights):
                    own_b[:, row - owned.start] = _in_blocks(values[None])[:, 0]
                    yield

    def _shares(self, module: str, owned: RankRange) -> tuple[Tensor, Tensor]:
        """Return an adapter's A [layers, rank, in] and B [layers, ⌈out / 32⌉, rank, 32] of a module, to be written."""
        a, b = (factor[owned.start : owned.start + owned.rank] for factor in self._modules[module])
        layers, rank = self._num_layers, owned.rank
        wide, blocks = a.shape[1] // layers, b.shape[1] // layers // abi.BLOCK
        return a.view(layers, rank, wide), b.view(layers, blocks, rank, abi.BLOCK)

    def moving(self, module: str, source: RankRange, target_start: int) -> Iterator[None]:
        """Move a range to another start, piece by piece; until the last one it is nowhere whole."""
        if module == VOCABULARY:
            self.vocabularies.move(source, target_start)
            return
        self.output_rows.moved(module, source, target_start)
        by = target_start - source.start
        for factor in self._modules[module]:
            row = factor[0].nbytes
            for rows in moved(source.rank, source.rank * row, down=by < 0):
                first, last = source.start + rows.start, source.start + rows.stop
                factor[first + by : last + by] = factor[first:last].clone()
                yield

    def release(self, ranges: AdapterRanges) -> None:
        """See RankArena."""
        self.vocabularies.let_go(ranges)


def bytes_per_row(shape: DecoderShape) -> dict[str, int]:
    """Return what one rank row of each module takes over all layers."""
    each = shape.num_layers * torch.bfloat16.itemsize
    return {module: each * (wide + _blocks(out) * abi.BLOCK) for module, (out, wide) in shape.modules.items()}


def _blocks(out: int) -> int:
    return -(-out // abi.BLOCK)


def _in_blocks(b: Tensor) -> Tensor:
    """Bring [rank, out] to [⌈out / 32⌉, rank, 32]."""
    rank, out = b.shape
    return F.pad(b, (0, _blocks(out) * abi.BLOCK - out)).view(rank, -1, abi.BLOCK).transpose(0, 1)
