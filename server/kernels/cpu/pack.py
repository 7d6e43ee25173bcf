"""Matrices of checkpoints in the native kernels' layout, which native/abi.h describes.

What a 4-bit matrix loses on the way: NF4's sixteen values are rounded to signed bytes, and scales to f16, beside a
power of two of the whole matrix; a scale under 2⁻³⁹ of the largest becomes nothing. Codes stay as they are.
"""

import ctypes
import math
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from manylora.quant.awq import AwqTensor
from manylora.quant.dense import DenseTensor
from manylora.quant.gptq import GptqTensor
from manylora.quant.int8 import Int8Tensor
from manylora.quant.nf4 import NF4_CODE, Nf4Tensor
from manylora.server.kernels.backend import WeightSource
from manylora.server.kernels.cpu import abi
from manylora.server.kernels.cpu.abi import BF16, BLOCK, INT8, SPLIT8, TABLE4
from manylora.server.kernels.cpu.memory import WeightMemory

FROM_NF4, FROM_GPTQ, FROM_AWQ, FROM_INT8, FROM_BF16 = range(5)
PADDING = 64
NF4_FACTOR = 123.25
"""Of all factors up to 127 the one by which NF4's values are nearest to whole numbers."""
NF4_TABLE = (-123, -86, -65, -49, -35, -23, -11, 0, 10, 20, 30, 42, 54, 69, 89, 123)
INT4_TABLE = tuple(range(-8, 8))
VALUES = {
    NF4_TABLE: (NF4_CODE * NF4_FACTOR).to(torch.bfloat16),
    INT4_TABLE: torch.tensor(INT4_TABLE).to(torch.bfloat16),
}
"""What codes stand for beside activations of bfloat16, by the table of bytes: as fine as those are."""
SPLIT_MOST = 119
"""ML_SPLIT_MOST: the largest code that can be split into halves after what is added to it."""
LARGEST_EXPONENT = 15
"""A matrix's largest scale lies in [2¹⁴, 2¹⁵): within f16's range, whose normal numbers begin at 2⁻¹⁴."""


class Packer(Protocol):
    """The compiled code: library.Kernels."""

    def call(self, name: str, *arguments: int) -> int:
        """Run a function of the library on its threads; structures are given by their addresses."""
        ...


@dataclass(frozen=True, slots=True)
class SplitTensor:
    """A matrix in 8 bits whose bytes' halves are to lie apart, which the kernels' search() reads: codes ±SPLIT_MOST."""

    whole: Int8Tensor

    is_quantized: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.whole.shape

    @property
    def nbytes(self) -> int:
        """Bytes held, scales included."""
        return self.whole.nbytes

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the [out, in] matrix."""
        return self.whole.dequantize(dtype)

    def to(self, device: torch.device) -> "SplitTensor":
        """Return the same matrix on ``device``."""
        return SplitTensor(self.whole.to(device))


class CannotPack(ValueError):
    """A matrix that the native kernels don't take. The message says why."""


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A matrix that the kernels read, and the memory that it lies in."""

    kind: int
    shape: tuple[int, int]
    """(out_features, in_features)"""
    group: int
    """Inputs to a scale; 64 where there are no scales."""
    gain: float
    codes: Tensor
    """uint8, as native/abi.h lays them out."""
    scales: Tensor | None
    """float16 [blocks, groups, 32]"""
    sums: Tensor | None
    """int16, likewise"""
    zeros: Tensor | None
    """int16, likewise; None where all are zero."""
    table: Tensor | None
    """int8 [16], of 4 bits"""
    order: Tensor | None
    """int32 [padded inputs]: which input stands at each place, −1 for none; None where it is its own."""
    bias: Tensor | None
    """float32 [out]"""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = (self.codes, self.scales, self.sums, self.zeros, self.table, self.order, self.bias)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    @property
    def blocks(self) -> int:
        """Blocks of 32 outputs."""
        return -(-self.shape[0] // BLOCK)

    @property
    def padded_in(self) -> int:
        """Inputs with padding."""
        return _padded(self.shape[1])

    def structure(self, activations: int = abi.ACTIVATIONS_INT8) -> abi.Matrix:
        """Return the C structure, for one of abi's ACTIVATIONS. It points into this matrix, which must outlive it."""
        wide = self.table is not None and activations == abi.ACTIVATIONS_BF16
        return abi.Matrix(
            kind=self.kind,
            out=self.shape[0],
            blocks=self.blocks,
            padded_in=self.padded_in,
            group=self.group,
            gain=self.gain,
            activations=activations,
            values=_address(VALUES[tuple(self.table.tolist())]) if self.table is not None and wide else None,
            table=_address(self.table),
            codes=_address(self.codes),
            scales=_address(self.scales),
            sums=_address(self.sums),
            zeros=_address(self.zeros),
            order=_address(self.order),
            bias=_address(self.bias),
            **{"in": self.shape[1]},
        )


@dataclass(frozen=True, slots=True)
class _Grouping:
    """How a source's groups lie along the inputs."""

    group: int
    of_packed: Tensor
    """int32 [padded inputs / group]: the source's group, −1 for padding alone."""
    order: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Recipe:
    """What the compiled code needs to know of a source."""

    form: int
    kind: int
    codes: Tensor
    grouping: _Grouping
    scales: Tensor | None = None
    """float32 [out, groups], or the transpose of [groups, out]"""
    zeros: Tensor | None = None
    """int16, likewise"""
    table: tuple[int, ...] | None = None
    factor: float = 1.0
    bits: int = 4


def can_pack(source: WeightSource) -> str | None:
    """Return why the native kernels can't take a matrix, or None if they can."""
    try:
        _recipe(source)
    except CannotPack as error:
        return str(error)
    return None


def pack(
    source: WeightSource, bias: Tensor | None, packer: Packer, memory: WeightMemory | None = None
) -> PackedMatrix:
    """Lay a matrix out for the native kernels, in ``memory`` if given.

    Raises CannotPack for one that they don't take, ValueError for one with scales that are not finite, MemoryError.
    """
    recipe = _recipe(source)
    out, wide = source.shape
    blocks, padded = -(-out // BLOCK), _padded(wide)
    group = recipe.grouping.group
    per_group = (blocks, padded // group, BLOCK)
    scaled = recipe.scales is not None
    empty = (memory or WeightMemory()).empty
    matrix = PackedMatrix(
        kind=recipe.kind,
        shape=(out, wide),
        group=group,
        gain=1.0 if recipe.scales is None else _gain(recipe.scales, recipe.factor),
        codes=empty((blocks * padded * half_bytes(recipe.kind) * 16,), torch.uint8),
        scales=empty(per_group, torch.float16) if scaled else None,
        sums=empty(per_group, torch.int16) if scaled else None,
        zeros=None if recipe.zeros is None else empty(per_group, torch.int16),
        table=None if recipe.table is None else torch.tensor(recipe.table, dtype=torch.int8),
        order=recipe.grouping.order,
        bias=None if bias is None else bias.to(torch.float32).contiguous(),
    )
    _fill(matrix, recipe, packer)
    return matrix


def _fill(matrix: PackedMatrix, recipe: _Recipe, packer: Packer) -> None:
    codes, scales, zeros = recipe.codes.contiguous(), recipe.scales, recipe.zeros
    of_output, of_group = (0, 0) if scales is None else scales.stride()
    source = abi.Source(
        form=recipe.form,
        out=matrix.shape[0],
        bits=recipe.bits,
        codes=codes.data_ptr(),
        scales=_address(scales),
        zeros=_address(zeros),
        groups=recipe.grouping.of_packed.data_ptr(),
        of_output=of_output,
        of_group=of_group,
        scaled=recipe.factor,
        **{"in": matrix.shape[1]},
    )
    structure = matrix.structure()
    if packer.call("pack", ctypes.addressof(source), ctypes.addressof(structure)):
        raise MemoryError(f"no memory to pack a matrix of {matrix.shape[0]} by {matrix.shape[1]}")


def _recipe(source: WeightSource) -> _Recipe:
    if isinstance(source, Nf4Tensor):
        return _nf4(source)
    if isinstance(source, GptqTensor):
        return _gptq(source)
    if isinstance(source, AwqTensor):
        return _awq(source)
    if isinstance(source, Int8Tensor):
        grouping = _even_groups(source.shape[1], source.group)
        return _Recipe(FROM_INT8, INT8, source.codes, grouping, source.scales.float().contiguous())
    if isinstance(source, SplitTensor):
        assert max(abs(int(bound)) for bound in source.whole.codes.aminmax()) <= SPLIT_MOST
        return replace(_recipe(source.whole), kind=SPLIT8)
    if isinstance(source, DenseTensor):
        grouping = _even_groups(source.shape[1], PADDING)
        return _Recipe(FROM_BF16, BF16, source.weight.to(torch.bfloat16), grouping)
    raise CannotPack(f"a {type(source).__name__} has no native form")


def _nf4(source: Nf4Tensor) -> _Recipe:
    size, wide = source.blocksize, source.shape[1]
    if wide % size:
        raise CannotPack(f"blocks of {size} weights run over the ends of rows of {wide}")
    scales = source.scales().view(source.shape[0], -1)
    grouping = _even_groups(wide, size)
    return _Recipe(FROM_NF4, TABLE4, source.codes, grouping, scales, table=NF4_TABLE, factor=1 / NF4_FACTOR)


def _gptq(source: GptqTensor) -> _Recipe:
    if source.bits not in (4, 8):
        raise CannotPack(f"GPTQ of {source.bits} bits has no native form")
    grouping = _grouping(source.g_idx.to(torch.int64))
    form = _Recipe(FROM_GPTQ, TABLE4, source.qweight, grouping, source.scales.float().T, bits=source.bits)
    return _with_zeros(form, source.zero_points())


def _awq(source: AwqTensor) -> _Recipe:
    wide, groups = source.shape[1], source.scales.shape[0]
    form = _Recipe(
        FROM_AWQ, TABLE4, source.qweight, _even_groups(wide, wide // groups), source.scales.float().T
    )
    return _with_zeros(form, source.zero_points())


def _with_zeros(recipe: _Recipe, points: Tensor) -> _Recipe:
    """Take half of the codes' range from codes and zero points ([groups, out]): symmetric ones are 0 then."""
    zeros = (points.to(torch.int16) - (1 << recipe.bits - 1)).contiguous().T
    kind, table = (TABLE4, INT4_TABLE) if recipe.bits == 4 else (INT8, None)
    return replace(recipe, kind=kind, table=table, zeros=zeros if bool(zeros.any()) else None)


def _even_groups(wide: int, size: int) -> _Grouping:
    return _grouping(torch.arange(wide) // size)


def _grouping(of_input: Tensor) -> _Grouping:
    """Sort inputs by their group (int64 [in]); each group must begin at a multiple of 32 then."""
    wide = len(of_input)
    order = of_input.argsort(stable=True)
    groups = of_input[order]
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), (groups.diff() != 0).nonzero().view(-1) + 1))
    group = next((size for size in (64, 32) if not bool((starts % size).any())), None)
    if group is None:
        raise CannotPack("groups of inputs that are no multiple of 32 have no native form")
    padded = _padded(wide)
    of_packed = torch.full((padded // group,), -1, dtype=torch.int32)
    of_packed[: -(-wide // group)] = groups[::group].to(torch.int32)
    if torch.equal(order, torch.arange(wide)):
        return _Grouping(group, of_packed)
    places = torch.full((padded,), -1, dtype=torch.int32)
    places[:wide] = order.to(torch.int32)
    return _Grouping(group, of_packed, places)


def _gain(scales: Tensor, factor: float) -> float:
    least, most = (float(bound) for bound in scales.aminmax())
    largest = max(-least, most) * factor
    if not math.isfinite(largest):
        raise ValueError("a scale of a quantised matrix is not finite")
    return 2.0 ** max(-126, math.frexp(largest)[1] - LARGEST_EXPONENT) if largest else 1.0


def half_bytes(kind: int) -> int:
    """Return half bytes of a weight of ``kind``."""
    return {TABLE4: 1, INT8: 2, SPLIT8: 2, BF16: 4}[kind]


def _padded(wide: int) -> int:
    return -(-wide // PADDING) * PADDING


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
