"""The plain backend's rank arena: two tensors a layer and module."""

import torch
from torch import Tensor

from manylora.adapters.types import AdapterWeights
from manylora.server.kernels.plain.memory import zeros
from manylora.server.kernels.shape import DecoderShape
from manylora.server.kernels.step import AdapterRanges, RankRange


class PlainArena:
    """See RankArena. For each layer and module A [rows, in] and B [rows, out], the scale folded into B."""

    def __init__(self, shape: DecoderShape, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = rows
        self._paths = shape.paths
        self.layers: tuple[dict[str, tuple[Tensor, Tensor]], ...] = tuple(
            {
                module: (zeros((rows, wide), dtype, device), zeros((rows, out), dtype, device))
                for module, (out, wide) in shape.modules.items()
            }
            for _ in range(shape.num_layers)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(a.nbytes + b.nbytes for layer in self.layers for a, b in layer.values())

    def write(self, ranges: AdapterRanges, weights: AdapterWeights) -> None:
        """Copy an adapter's factors into its ranges; rows that a layer doesn't use become zero."""
        for buffers, paths in zip(self.layers, self._paths, strict=True):
            for module, owned in ranges.items():
                pair = weights.pairs.get(paths[module])
                used = 0 if pair is None else pair.a.shape[0]
                for index, buffer in enumerate(buffers[module]):
                    rows = buffer[owned.start : owned.start + owned.rank]
                    if pair is not None:
                        rows[:used].copy_(pair.b if index else pair.a)
                    rows[used:].zero_()

    def move(self, module: str, source: RankRange, target_start: int) -> None:
        """Move a range to another start; the two may overlap."""
        for buffers in self.layers:
            for buffer in buffers[module]:
                rows = buffer[source.start : source.start + source.rank].clone()
                buffer[target_start : target_start + source.rank] = rows


def bytes_per_row(shape: DecoderShape, dtype: torch.dtype) -> dict[str, int]:
    """Return what one rank row of each module takes over all layers."""
    each = shape.num_layers * dtype.itemsize
    return {module: each * (out + wide) for module, (out, wide) in shape.modules.items()}
