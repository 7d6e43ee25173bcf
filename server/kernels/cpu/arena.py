"""The native backend's rank arena: bfloat16, all of an adapter's B in a row, as the outputs' blocks of 32 are read."""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from manylora.adapters.types import AdapterWeights
from manylora.server.kernels.cpu import abi
from manylora.server.kernels.plain.memory import zeros
from manylora.server.kernels.shape import DecoderShape
from manylora.server.kernels.step import LORA_MODULES, AdapterRanges, RankRange

CPU = torch.device("cpu")


class CpuArena:
    """See RankArena. For each layer and module A [rows, in], and as many rows of B, the scale folded in.

    An adapter's range of rows is its own share of B, laid out [⌈out / 32⌉, rank, 32].
    """

    def __init__(self, shape: DecoderShape, rows: int) -> None:
        self.rows = rows
        self._paths = shape.paths
        self._layers: tuple[dict[str, tuple[Tensor, Tensor]], ...] = tuple(
            {
                module: (
                    zeros((rows, wide), torch.bfloat16, CPU),
                    zeros((rows, _blocks(out) * abi.BLOCK), torch.bfloat16, CPU),
                )
                for module, (out, wide) in shape.modules.items()
            }
            for _ in range(shape.num_layers)
        )
        self._pairs = (abi.Pair * (shape.num_layers * len(LORA_MODULES)))(
            *(
                abi.Pair(*(factor.data_ptr() for factor in layer[module]))
                for layer in self._layers
                for module in LORA_MODULES
            )
        )
        self.structure = abi.Arena(pair=ctypes.addressof(self._pairs))

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(a.nbytes + b.nbytes for layer in self._layers for a, b in layer.values())

    @property
    def address(self) -> int:
        """Of the structure that kernels read."""
        return ctypes.addressof(self.structure)

    def write(self, ranges: AdapterRanges, weights: AdapterWeights) -> None:
        """Copy an adapter's factors into its ranges; rows that a layer doesn't use become zero."""
        for buffers, paths in zip(self._layers, self._paths, strict=True):
            for module, owned in ranges.items():
                a, b = buffers[module]
                pair = weights.pairs.get(paths[module])
                rows = slice(owned.start, owned.start + owned.rank)
                own_a, own_b = a[rows], b[rows].view(-1, owned.rank, abi.BLOCK)
                used = 0 if pair is None else pair.a.shape[0]
                if pair is not None:
                    own_a[:used] = pair.a
                    own_b[:, :used] = _in_blocks(pair.b)
                own_a[used:] = 0
                own_b[:, used:] = 0

    def move(self, module: str, source: RankRange, target_start: int) -> None:
        """Move a range to another start; the two may overlap."""
        old = slice(source.start, source.start + source.rank)
        new = slice(target_start, target_start + source.rank)
        for buffers in self._layers:
            for factor in buffers[module]:
                factor[new] = factor[old].clone()


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
