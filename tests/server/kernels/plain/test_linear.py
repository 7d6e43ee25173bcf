"""Linear layers of the plain backend against dequantise and multiply, and which kernel NF4 gets, and why."""

import math
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from manylora.quant.awq import AwqTensor
from manylora.quant.dense import DenseTensor
from manylora.quant.format import QuantizedTensor
from manylora.quant.gptq import quantize_gptq_nearest
from manylora.quant.nf4 import quantize_nf4
from manylora.server.kernels.plain import PlainBackend
from manylora.server.kernels.plain.linear import (
    DequantizedLinear,
    FusedNf4Linear,
    can_fuse_nf4,
    fuse_nf4,
    fused_nf4_reason,
)
from manylora.server.kernels.reference import linear
from tests.quant.bnb import functional
from tests.quant.packers import awq_tensors, nearest_codes

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
HAS_FUSED = fused_nf4_reason(CPU, torch.bfloat16) is None


def matrix(out: int, wide: int, seed: int = 0) -> Tensor:
    values = torch.randn(out, wide, generator=torch.Generator().manual_seed(seed))
    return values / math.sqrt(wide)


def awq(weight: Tensor) -> QuantizedTensor:
    return AwqTensor(**awq_tensors(nearest_codes(weight, 32, 4)))


FORMATS: dict[str, Callable[[Tensor], QuantizedTensor]] = {
    "dense": DenseTensor,
    "nf4": quantize_nf4,
    "nf4 double": partial(quantize_nf4, double_quant=True),
    "gptq": partial(quantize_gptq_nearest, group_size=32),
    "gptq 8 bits": partial(quantize_gptq_nearest, group_size=-1, bits=8),
    "awq": awq,
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bias", [False, True])
def test_stacked_parts_multiply_as_their_dequantised_values(
    name: str, dtype: torch.dtype, bias: bool
) -> None:
    """Three parts of other sizes, as q, k and v are, for few and many rows."""
    parts = [FORMATS[name](matrix(out, 96, out)) for out in (64, 32, 40)]
    vector = torch.randn(136, generator=torch.Generator().manual_seed(9)) if bias else None
    # 40 rows are not a multiple of 32, so bitsandbytes' kernel is not used, whose scales are bfloat16.
    prepared = PlainBackend(CPU, dtype).prepare(parts, vector)
    assert prepared.shape == (136, 96)
    weight = torch.cat([part.dequantize(dtype) for part in parts])
    for rows in (1, 2, 17, 200):
        x = matrix(rows, 96, 3).to(dtype) * 10
        expected = linear(x, weight, None if vector is None else vector.to(dtype))
        ours = prepared(x)
        assert ours.dtype == dtype
        scale = float(expected.abs().max())
        assert float((ours.float() - expected).abs().max()) <= TOLERANCE[dtype] * scale


def test_mixed_parts_are_multiplied_each_as_it_is() -> None:
    parts: list[QuantizedTensor] = [quantize_nf4(matrix(32, 64)), DenseTensor(matrix(32, 64, 1))]
    prepared = PlainBackend(CPU, torch.float32).prepare(parts, None)
    weight = torch.cat([part.dequantize(torch.float32) for part in parts])
    x = matrix(20, 64, 2)
    torch.testing.assert_close(prepared(x), linear(x, weight), rtol=2e-6, atol=2e-6)
    assert prepared.nbytes == sum(part.nbytes for part in parts)


@pytest.mark.parametrize("mixed", [False, True])
def test_what_is_not_quantised_is_not_kept(mixed: bool) -> None:
    weight, x = torch.randn(8, 64), torch.randn(2, 64)
    parts: list[QuantizedTensor] = [DenseTensor(weight)]
    if mixed:
        parts.append(quantize_nf4(torch.randn(8, 64)))
    prepared = PlainBackend(torch.device("cpu"), torch.float32).prepare(parts, None)
    before = prepared(x).clone()
    weight.zero_()
    assert torch.equal(prepared(x), before)


def test_the_result_is_the_callers_own() -> None:
    """Backends add adapters and residuals to it in place."""
    weight, x = matrix(32, 64), matrix(16, 64, 2)
    prepared = PlainBackend(CPU, torch.float32).prepare([DenseTensor(weight)], None)
    first = prepared(x).clone()
    prepared(x).zero_()
    assert torch.equal(prepared(x), first)


# Which kernel, and why.


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        ("cuda", torch.bfloat16, "it is for CPUs"),
        ("cpu", torch.float32, "it computes in bfloat16"),
        ("cpu", torch.float16, "it computes in bfloat16"),
    ],
)
def test_why_the_fused_kernel_is_not_used(device: str, dtype: torch.dtype, reason: str) -> None:
    assert fused_nf4_reason(torch.device(device), dtype) == reason


def test_a_processor_without_avx512_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "has_avx512bf16", lambda: False)
    backend = PlainBackend(CPU, torch.bfloat16)
    assert backend.nf4_kernel == "dequantise + matmul (the processor has no AVX-512 BF16)"
    assert isinstance(backend.prepare([quantize_nf4(matrix(64, 64))], None), DequantizedLinear)


def test_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    backend = PlainBackend(CPU, torch.bfloat16)
    assert backend.nf4_kernel == "dequantise + matmul (bitsandbytes is not installed)"


def test_shapes_that_the_fused_kernel_takes() -> None:
    fits, rows, columns = (quantize_nf4(matrix(*shape)) for shape in ((64, 128), (48, 128), (64, 96)))
    assert can_fuse_nf4([fits])
    assert not can_fuse_nf4([rows])
    assert not can_fuse_nf4([columns])
    assert not can_fuse_nf4([fits, DenseTensor(matrix(32, 128))])


def test_the_fused_layout_is_that_of_bitsandbytes() -> None:
    """Packing needs no such processor, so it is held everywhere."""
    weight = matrix(96, 128)
    ours = fuse_nf4([quantize_nf4(weight[:64]), quantize_nf4(weight[64:])], None)
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    theirs, packed = functional._convert_weight_packed_for_cpu(codes, state)
    assert torch.equal(ours.packed.view(-1), theirs.view(-1))
    assert torch.equal(ours.scales.view(-1), packed.absmax.view(-1))
    assert ours.shape == (96, 128)


@pytest.mark.skipif(not HAS_FUSED, reason=f"bitsandbytes' kernel: {fused_nf4_reason(CPU, torch.bfloat16)}")
def test_the_fused_kernel_multiplies_and_keeps_rows_apart() -> None:
    backend = PlainBackend(CPU, torch.bfloat16)
    assert backend.nf4_kernel == "bitsandbytes' fused kernel"
    parts = [quantize_nf4(matrix(out, 256, out), double_quant=True) for out in (64, 32)]
    prepared = backend.prepare(parts, torch.ones(96))
    assert isinstance(prepared, FusedNf4Linear)
    weight = torch.cat([part.dequantize(torch.bfloat16) for part in parts])
    x = matrix(130, 256, 3).bfloat16() * 16
    expected = linear(x, weight, torch.ones(96))
    ours = prepared(x)
    assert float((ours.float() - expected).abs().max()) <= 0.02 * float(expected.abs().max())
    for rows in (1, 2, 3, 8, 17, 33, 64, 129):
        assert torch.equal(prepared(x[:rows]), ours[:rows])
