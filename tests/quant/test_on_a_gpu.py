"""What dequantising asks of a GPU: neither bring it something from the host nor wait for it, or no step is recorded."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from manylora.quant.awq import pack_awq
from manylora.quant.gptq import quantize_gptq_nearest
from manylora.quant.int8 import quantize_int8
from manylora.quant.nf4 import quantize_nf4

FROM_HOST = ("aten.lift_fresh", "aten._local_scalar_dense", "aten.nonzero", "aten.masked_select")
WEIGHT = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))


class Noted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes ops that bring tensors from the host, or read the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if str(func).startswith(FROM_HOST):
            self.found.append(str(func))
        return func(*args, **kwargs or {})


def awq() -> Any:
    codes = torch.arange(128 * 64).view(128, 64).to(torch.uint8) & 15
    return pack_awq(codes, codes[:2].clone(), torch.rand(2, 64))


@pytest.mark.parametrize(
    "make",
    [
        lambda: quantize_nf4(WEIGHT),
        lambda: quantize_nf4(WEIGHT, double_quant=True),
        lambda: quantize_int8(WEIGHT),
        lambda: quantize_gptq_nearest(WEIGHT, 64),
        awq,
    ],
    ids=["nf4", "nf4 with nested scales", "int8", "gptq", "awq"],
)
def test_after_the_first_time_all_is_on_the_device(make: Callable[[], Any]) -> None:
    matrix = make()
    matrix.dequantize(torch.bfloat16)
    with Noted() as noted:
        matrix.dequantize(torch.bfloat16)
    assert not noted.found
