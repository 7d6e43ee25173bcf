"""Packed matrices are taken apart and put together again as they were, and nothing else gets to the kernels."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from manylora.quant.awq import AwqTensor
from manylora.quant.dense import DenseTensor
from manylora.quant.gptq import GptqTensor
from manylora.quant.int8 import Int8Tensor
from manylora.quant.nf4 import Nf4Tensor
from manylora.server.kernels.backend import WeightSource
from manylora.server.kernels.cpu.backend import CpuBackend
from manylora.server.kernels.cpu.library import Kernels
from manylora.server.kernels.cpu.linear import CpuLinear
from manylora.server.kernels.cpu.pack import SplitTensor
from manylora.server.kernels.kept import Apart
from tests.server.kernels.cpu.matrices import FORMATS

OUT, WIDE, GROUP = 40, 192, 64


def counted(*shape: int, step: int, below: int) -> Tensor:
    """Return whole numbers that no random generator has a say in, int64."""
    return (torch.arange(torch.Size(shape).numel()) * step % below).view(shape)


def powers(*shape: int) -> Tensor:
    return 2.0 ** -counted(*shape, step=3, below=7).float()


def words(*shape: int) -> Tensor:
    return (counted(*shape, step=2654435761, below=1 << 32) - (1 << 31)).to(torch.int32)


def counted_matrices() -> dict[str, WeightSource]:
    groups = WIDE // GROUP
    order = (counted(WIDE, step=5, below=WIDE) // GROUP).to(torch.int32)
    halves = powers(groups, OUT).half()
    return {
        "nf4": Nf4Tensor(
            counted(OUT * WIDE // 2, step=37, below=256).to(torch.uint8), powers(OUT * groups), (OUT, WIDE)
        ),
        "gptq": GptqTensor(words(WIDE // 8, OUT), words(groups, OUT // 8), halves, order, 4, 1),
        "gptq8": GptqTensor(words(WIDE // 4, OUT), words(groups, OUT // 4), halves, order, 8, 1),
        "awq": AwqTensor(words(WIDE, OUT // 8), words(groups, OUT // 8), halves),
        "int8": Int8Tensor(
            (counted(OUT, WIDE, step=37, below=255) - 127).to(torch.int8), powers(OUT, groups)
        ),
        "bf16": DenseTensor(counted(OUT, WIDE, step=37, below=251).bfloat16()),
        "split": SplitTensor(
            Int8Tensor((counted(OUT, WIDE, step=37, below=239) - 119).to(torch.int8), powers(OUT, groups))
        ),
    }


PACKED_BY_LAYOUT = {2: "d3563a1e7bb05873"}
"""By the number of the layout (ML_LAYOUT in native/pack.h): the digest of all matrices, packed."""


def packed_digest(backend: CpuBackend) -> str:
    digest = hashlib.sha256()
    for name, source in counted_matrices().items():
        apart = backend.keeper.take_apart(backend.prepare([source], torch.arange(OUT).float()))
        for part, tensor in sorted(apart.tensors.items()):
            digest.update(f"{name} {part} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def test_another_layout_has_another_number(kernels: Kernels) -> None:
    """If this fails, matrices are packed otherwise than they were: raise ML_LAYOUT, and write down the new digest.

    Else servers would read weights that an older one kept, and compute nonsense.
    """
    backend = CpuBackend(kernels, torch.bfloat16)
    assert packed_digest(backend) == PACKED_BY_LAYOUT.get(kernels.call("layout"))


@pytest.fixture
def backend(kernels: Kernels) -> CpuBackend:
    return CpuBackend(kernels, torch.bfloat16)


@pytest.mark.parametrize("name", FORMATS)
def test_a_matrix_is_put_together_as_it_was(name: str, backend: CpuBackend) -> None:
    source = FORMATS[name]
    linear = backend.prepare([source, source], torch.randn(2 * source.shape[0]))
    again = backend.keeper.put_together(backend.keeper.take_apart(linear))
    assert again.shape == linear.shape
    for old, new in zip(linear.parts, again.parts, strict=True):
        held = {field: getattr(old, field) for field in ("kind", "shape", "group", "gain")}
        assert held == {field: getattr(new, field) for field in held}
        for field in ("codes", "scales", "sums", "zeros", "table", "order", "bias"):
            one, two = getattr(old, field), getattr(new, field)
            assert (one is None) == (two is None)
            assert one is None or torch.equal(one, two)


def without(part: str) -> Callable[[Apart], Apart]:
    return lambda apart: replace(
        apart, tensors={name: tensor for name, tensor in apart.tensors.items() if name != part}
    )


def with_fact(name: str, value: Any) -> Callable[[Apart], Apart]:
    def change(apart: Apart) -> Apart:
        [facts] = apart.facts["parts"]
        return replace(apart, facts={"parts": [{**facts, name: value}]})

    return change


def with_tensor(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[Apart], Apart]:
    return lambda apart: replace(apart, tensors={**apart.tensors, part: change(apart.tensors[part])})


@pytest.mark.parametrize(
    "spoil",
    [
        without("0.codes"),
        without("0.scales"),
        without("0.sums"),
        without("0.table"),
        with_fact("shape", [OUT + 32, WIDE]),
        with_fact("shape", [OUT, WIDE + 64]),
        with_fact("shape", [0, WIDE]),
        with_fact("group", 16),
        with_fact("kind", 1),
        with_fact("kind", 7),
        with_fact("gain", "much"),
        with_tensor("0.codes", lambda codes: codes[:-1]),
        with_tensor("0.scales", lambda scales: scales.float()),
        with_tensor("0.zeros", lambda zeros: zeros[:1]),
        with_tensor("0.order", lambda order: order + 1),
        lambda apart: replace(apart, facts={}),
        lambda apart: replace(apart, facts={"parts": []}),
        lambda apart: replace(apart, facts={"parts": "none"}),
    ],
)
def test_what_is_no_matrix_is_refused(spoil: Callable[[Apart], Apart], backend: CpuBackend) -> None:
    linear = backend.prepare([counted_matrices()["gptq"]], None)
    assert isinstance(linear, CpuLinear)
    apart = backend.keeper.take_apart(linear)
    assert "0.order" in apart.tensors
    assert "0.zeros" in apart.tensors
    with pytest.raises(ValueError, match=r"."):
        backend.keeper.put_together(spoil(apart))
