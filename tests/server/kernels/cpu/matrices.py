"""Matrices of every format that the native kernels take, small and of odd shapes, by name."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from manylora.quant.awq import AwqTensor, pack_awq
from manylora.quant.dense import DenseTensor
from manylora.quant.gptq import GptqTensor, quantize_gptq_nearest
from manylora.quant.int8 import LARGEST, quantize_int8
from manylora.quant.nf4 import quantize_nf4
from manylora.server.kernels.backend import WeightSource
from manylora.server.kernels.cpu.pack import SPLIT_MOST, SplitTensor

NF4_SHAPES = ((1, 64), (31, 192), (33, 128), (64, 896))
GPTQ = ((4, 32), (4, 64), (4, 128), (4, -1), (8, 32), (8, 128))


def normal(out: int, wide: int) -> Tensor:
    """Return weights whose groups differ in size."""
    generator = torch.Generator().manual_seed(out * 1000 + wide)
    return torch.randn(out, wide, generator=generator) * torch.rand(1, wide, generator=generator)


def gptq(out: int, wide: int, bits: int, group: int) -> GptqTensor:
    """Return asymmetric codes."""
    return quantize_gptq_nearest(normal(out, wide) + 0.3, group, bits)


def shuffled(matrix: GptqTensor) -> GptqTensor:
    """Return the codes with inputs dealt out to the groups, as desc_act does."""
    order = torch.randperm(len(matrix.g_idx), generator=torch.Generator().manual_seed(1))
    return replace(matrix, g_idx=matrix.g_idx[order].contiguous())


def awq(out: int, wide: int, group: int, zero: int | None = None) -> AwqTensor:
    """Return random codes, with zero points that are random too or all the same."""
    generator = torch.Generator().manual_seed(out + wide)
    codes = torch.randint(0, 16, (wide, out), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, 16, (wide // group, out), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(wide // group, out, generator=generator) + 0.1).half()
    return pack_awq(codes, zeros if zero is None else torch.full_like(zeros, zero), scales)


def split(weight: Tensor) -> SplitTensor:
    """Return codes from −119 to 119, all of which there are in a large matrix."""
    eight = quantize_int8(weight, 32)
    return SplitTensor(replace(eight, codes=(eight.codes * (SPLIT_MOST / LARGEST)).round().to(torch.int8)))


def every_format() -> Iterator[tuple[str, WeightSource]]:
    """Yield names and matrices."""
    for out, wide in NF4_SHAPES:
        yield f"nf4-{out}x{wide}", quantize_nf4(normal(out, wide))
    yield "nf4-nested", quantize_nf4(normal(40, 256), double_quant=True)
    yield "nf4-by-32", quantize_nf4(normal(33, 96), 32)
    yield "nf4-by-128", quantize_nf4(normal(33, 256), 128)
    for bits, group in GPTQ:
        yield f"gptq{bits}-by-{group}", gptq(40, 384, bits, group)
    for bits in (4, 8):
        yield f"gptq{bits}-shuffled", shuffled(gptq(40, 384, bits, 128))
    yield "gptq4-shuffled-by-32", shuffled(gptq(40, 96, 4, 32))
    yield "awq", awq(72, 256, 128)
    yield "awq-symmetric", awq(40, 96, 32, zero=8)
    for out, wide in ((1, 32), (50, 100), (33, 192)):
        yield f"int8-{out}x{wide}", quantize_int8(normal(out, wide))
        yield f"bf16-{out}x{wide}", DenseTensor(normal(out, wide))
        yield f"split-{out}x{wide}", split(normal(out, wide))
    yield "bf16-50x101", DenseTensor(normal(50, 101))


FORMATS = dict(every_format())
