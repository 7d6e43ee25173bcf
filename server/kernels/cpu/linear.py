"""Linear weights of the native backend: packed matrices that read the same rows."""

from dataclasses import dataclass

from manylora.server.kernels.cpu.pack import PackedMatrix


@dataclass(frozen=True, slots=True)
class CpuLinear:
    """One packed matrix, or the parts of a fused one: q, k, v, or gate and up."""

    parts: tuple[PackedMatrix, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the fused matrix."""
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.nbytes for part in self.parts)
