"""Packed matrices written down and read back: what they are made of, checked before a kernel reads it."""

import platform
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from manylora.server.kernels.cpu.abi import BF16, BLOCK, INT8, SPLIT8, TABLE4
from manylora.server.kernels.cpu.library import Kernels
from manylora.server.kernels.cpu.linear import CpuLinear
from manylora.server.kernels.cpu.pack import PackedMatrix, half_bytes
from manylora.server.kernels.kept import Apart, Facts
from manylora.server.kernels.owned import own

TENSORS = ("codes", "scales", "sums", "zeros", "table", "order", "bias")


class CpuKeeper:
    """See Keeper."""

    def __init__(self, kernels: Kernels, options: str) -> None:
        # All levels of a processor have one layout, which pack.h numbers.
        self._layout = f"{platform.machine()}, layout {kernels.call('layout')}, {options}"

    @property
    def layout(self) -> str:
        """See Keeper."""
        return self._layout

    def take_apart(self, weight: object) -> Apart:
        """See Keeper."""
        parts = own(weight, CpuLinear).parts
        tensors = {
            f"{number}.{name}": tensor
            for number, part in enumerate(parts)
            for name in TENSORS
            if (tensor := getattr(part, name)) is not None
        }
        facts = [
            {"kind": part.kind, "shape": list(part.shape), "group": part.group, "gain": part.gain}
            for part in parts
        ]
        return Apart({"parts": facts}, tensors)

    def put_together(self, apart: Apart) -> CpuLinear:
        """See Keeper."""
        try:
            parts = tuple(
                _matrix(facts, {name: apart.tensors.get(f"{number}.{name}") for name in TENSORS})
                for number, facts in enumerate(apart.facts["parts"])
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no packed matrix: {error!r}") from None
        if not parts or len({part.shape[1] for part in parts}) > 1:
            raise ValueError("no parts of one matrix")
        return CpuLinear(parts)


def _matrix(facts: Facts, tensors: Mapping[str, Tensor | None]) -> PackedMatrix:
    out, wide = (int(size) for size in facts["shape"])
    codes = tensors["codes"]
    if codes is None:
        raise ValueError("codes are missing")
    matrix = PackedMatrix(
        kind=int(facts["kind"]),
        shape=(out, wide),
        group=int(facts["group"]),
        gain=float(facts["gain"]),
        codes=codes,
        **{name: tensors[name] for name in TENSORS[1:]},
    )
    for name, dtype, shape, needed in _expected(matrix):
        tensor = tensors[name]
        if tensor is None and needed:
            raise ValueError(f"{name} are missing")
        if tensor is not None and (tensor.dtype != dtype or tuple(tensor.shape) != shape):
            raise ValueError(f"{name} are {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")
    if matrix.order is not None and not bool(((matrix.order >= -1) & (matrix.order < wide)).all()):
        raise ValueError("order names inputs that aren't there")
    return matrix


def _expected(matrix: PackedMatrix) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], bool]]:
    """Yield each tensor's name, type and shape, and whether it must be there."""
    if (
        matrix.kind not in (TABLE4, INT8, BF16, SPLIT8)
        or matrix.group not in (32, 64)
        or min(matrix.shape) < 1
    ):
        raise ValueError(f"kind {matrix.kind}, group {matrix.group}, shape {matrix.shape}")
    scaled = matrix.kind != BF16
    per_group = (matrix.blocks, matrix.padded_in // matrix.group, BLOCK)
    yield "codes", torch.uint8, (matrix.blocks * matrix.padded_in * half_bytes(matrix.kind) * 16,), True
    yield "scales", torch.float16, per_group, scaled
    yield "sums", torch.int16, per_group, scaled
    yield "zeros", torch.int16, per_group, False
    yield "table", torch.int8, (16,), matrix.kind == TABLE4
    yield "order", torch.int32, (matrix.padded_in,), False
    yield "bias", torch.float32, (matrix.shape[0],), False
