"""Calls of the compiled products, and what they are held against: the same activations in float64."""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from manylora.server.kernels.cpu.abi import ACTIVATIONS_BF16, ACTIVATIONS_INT8, BF16
from manylora.server.kernels.cpu.library import Kernels
from manylora.server.kernels.cpu.pack import PackedMatrix

LEAST = torch.finfo(torch.float32).tiny


def product(kernels: Kernels, matrix: PackedMatrix, x: Tensor, activations: int = ACTIVATIONS_INT8) -> Tensor:
    """Return x [rows, in] times the matrix, plus its bias: [rows, out]."""
    y = torch.full((x.shape[0], matrix.shape[0]), 7.0)
    structure = matrix.structure(activations)
    assert x.is_contiguous()
    failed = kernels.call("linear", ctypes.addressof(structure), x.data_ptr(), x.shape[0], y.data_ptr())
    assert failed == 0
    return y


def rows_of(
    kernels: Kernels, matrix: PackedMatrix, ids: Tensor, activations: int = ACTIVATIONS_INT8
) -> Tensor:
    """Return the weights of some outputs, int32 [n]: [n, in]."""
    x = torch.empty(len(ids), matrix.shape[1])
    structure = matrix.structure(activations)
    kernels.call("embedding", ctypes.addressof(structure), ids.data_ptr(), len(ids), x.data_ptr())
    return x


def weights_of(kernels: Kernels, matrix: PackedMatrix, activations: int = ACTIVATIONS_INT8) -> Tensor:
    """Return the matrix as it is multiplied, [out, in]."""
    return rows_of(kernels, matrix, torch.arange(matrix.shape[0], dtype=torch.int32), activations)


def rounded(x: Tensor, matrix: PackedMatrix) -> Tensor:
    """Return what 8 bits keep of x [rows, in], as native/quantize.h says, in float64."""
    if matrix.kind == BF16:
        return x.double()
    wide = x.shape[1]
    places = torch.arange(wide) if matrix.order is None else matrix.order[matrix.order >= 0].long()
    padding = matrix.padded_in - wide
    groups = F.pad(x[:, places], (0, padding)).view(len(x), -1, matrix.group)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale >= LEAST, scale, 0.0)
    divisor = torch.where(scale > 0, scale, 1.0)
    zero = (-low / divisor).round()
    u = ((groups / divisor[..., None]).round() + zero[..., None]).clamp(0, 255)
    kept = ((u - zero[..., None]).double() * scale[..., None].double()).view(len(x), -1)[:, :wide]
    return torch.empty_like(kept).index_copy_(1, places, kept)


def expected(
    kernels: Kernels, matrix: PackedMatrix, x: Tensor, activations: int = ACTIVATIONS_INT8
) -> tuple[Tensor, Tensor]:
    """Return the product in float64, and the sum of its terms' magnitudes, of which its error is a small part."""
    weights = weights_of(kernels, matrix, activations).double()
    kept = x.bfloat16().double() if activations == ACTIVATIONS_BF16 else rounded(x, matrix)
    bias = torch.zeros(matrix.shape[0]) if matrix.bias is None else matrix.bias
    return kept @ weights.T + bias, kept.abs() @ weights.abs().T + bias.abs()
