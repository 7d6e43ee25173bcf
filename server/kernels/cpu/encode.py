"""16- and 32-bit weights brought to NF4 and int8 by the compiled kernels: quant/'s codes, many times faster."""

import ctypes

import torch
from torch import Tensor

from manylora.quant.int8 import GROUP, LARGEST, Int8Tensor
from manylora.quant.nf4 import BLOCKSIZE, NF4_CODE, Nf4Tensor, nest_scales
from manylora.server.kernels.cpu import abi
from manylora.server.kernels.cpu.pack import Packer

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def encode_nf4(weight: Tensor, packer: Packer, *, double_quant: bool = False) -> Nf4Tensor:
    """Quantise a matrix [out, in] as quant.nf4.quantize_nf4 does; non-finite values raise ValueError."""
    flat = weight.reshape(1, -1)
    codes = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8)
    scales = torch.empty(-(-flat.numel() // BLOCKSIZE))
    between = (NF4_CODE[1:] + NF4_CODE[:-1]) / 2
    _encode("encode_nf4", packer, flat, BLOCKSIZE, codes, scales, between)
    absmax = nest_scales(scales) if double_quant else scales
    return Nf4Tensor(codes, absmax, (weight.shape[0], weight.shape[1]))


def encode_int8(weight: Tensor, packer: Packer, group: int = GROUP, most: int = LARGEST) -> Int8Tensor:
    """Quantise a matrix [out, in] as quant.int8.quantize_int8 does; non-finite values raise ValueError.

    ``most``: the largest code's magnitude, at most 127.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(weight.shape[0], -(-weight.shape[1] // group))
    _encode("encode_int8", packer, weight, group, codes, scales, most=most)
    return Int8Tensor(codes, scales, group)


def _encode(
    name: str,
    packer: Packer,
    weight: Tensor,
    block: int,
    codes: Tensor,
    scales: Tensor,
    between: Tensor | None = None,
    most: int = 0,
) -> None:
    source = weight.contiguous()
    encoding = abi.Encoding(
        type=TYPES[source.dtype],
        block=block,
        rows=source.shape[0],
        weights=source.data_ptr(),
        between=None if between is None else between.data_ptr(),
        codes=codes.data_ptr(),
        scales=scales.data_ptr(),
        most=most,
        **{"in": source.shape[1]},
    )
    if packer.call(name, ctypes.addressof(encoding)):
        raise ValueError("the weight holds NaN or infinite values")
