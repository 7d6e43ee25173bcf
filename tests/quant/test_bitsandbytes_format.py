"""NF4 matrices as bitsandbytes stores them: read bit for bit, and refused by the tensor's name when malformed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from manylora.quant.checkpoint import Checkpoint
from manylora.quant.errors import CorruptCheckpoint, QuantError, UnsupportedQuantization
from manylora.quant.format import StoredFormat
from manylora.quant.nf4 import NestedScales, Nf4Tensor
from manylora.quant.weight_files import SINGLE
from tests.quant.bnb import functional

PATH = "model.layers.0.self_attn.q_proj"
STATE = "weight.quant_state.bitsandbytes__nf4"
NF4 = StoredFormat("nf4", 4)
Tensors = dict[str, Tensor]


def stored(
    shape: tuple[int, int], dtype: torch.dtype, double_quant: bool, kind: str = "nf4", blocksize: int = 64
) -> Tensors:
    """Return what bitsandbytes' Linear4bit puts into a state dict."""
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)
    codes, state = functional.quantize_4bit(
        weight, quant_type=kind, blocksize=blocksize, compress_statistics=double_quant
    )
    packed = state.as_dict(packed=True)
    return {"weight": codes, **{f"weight.{name}": tensor for name, tensor in packed.items()}}


def read(tensors: Tensors, directory: Path) -> tuple[Nf4Tensor, set[str]]:
    save_file({f"{PATH}.{name}": tensor.contiguous() for name, tensor in tensors.items()}, directory / SINGLE)
    matrix, taken = NF4.read(Checkpoint(directory), PATH)
    assert isinstance(matrix, Nf4Tensor)
    return matrix, taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(64, 128), (300, 192), (6, 50)])
def test_values_are_those_of_bitsandbytes(
    shape: tuple[int, int], dtype: torch.dtype, double_quant: bool, tmp_path: Path
) -> None:
    tensors = stored(shape, dtype, double_quant)
    matrix, taken = read(tensors, tmp_path)
    assert taken == {f"{PATH}.{name}" for name in tensors}
    assert matrix.shape == shape
    codes, state = functional.quantize_4bit(
        (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype),
        quant_type="nf4",
        blocksize=64,
        compress_statistics=double_quant,
    )
    assert torch.equal(matrix.dequantize(dtype), functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("blocksize", [128, 256, 4096])
def test_other_block_sizes(blocksize: int, tmp_path: Path) -> None:
    # bitsandbytes' CPU kernel reads the wrong absmax where rows are not whole blocks of such sizes.
    shape, dtype = (12, 4096), torch.bfloat16
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05).to(dtype)
    theirs = functional.quantize_4bit(weight, quant_type="nf4", blocksize=blocksize, compress_statistics=True)
    matrix, _ = read(stored(shape, dtype, double_quant=True, blocksize=blocksize), tmp_path)
    assert matrix.blocksize == blocksize
    assert torch.equal(matrix.dequantize(dtype), functional.dequantize_4bit(*theirs))


def state_with(**changes: Any) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        state = json.loads(bytes(tensors[STATE].tolist())) | changes
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def cut(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensors[name][:-1]})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (drop(STATE), "quant_state.bitsandbytes__nf4"),
        (drop("weight"), "weight"),
        (drop("weight.nested_absmax"), "nested_absmax"),
        (drop("weight.nested_quant_map"), "nested_quant_map"),
        (cut("weight"), "weight"),
        (cut("weight.absmax"), "weight.absmax"),
        (cut("weight.nested_absmax"), "nested_absmax"),
        (cut("weight.nested_quant_map"), "nested_quant_map"),
        (
            lambda tensors: tensors.update({"weight.absmax": tensors["weight.absmax"].float()}),
            "weight.absmax",
        ),
        (lambda tensors: tensors[STATE].zero_(), "quantisation state"),
        (state_with(shape=[300, 128]), "weight"),
        (state_with(shape=[300]), "quantisation state"),
        (state_with(blocksize=128), "weight.absmax"),
        (state_with(nested_offset=None), "quantisation state"),
    ],
)
def test_malformed_matrices_are_refused_by_name(
    change: Callable[[Tensors], object], named: str, tmp_path: Path
) -> None:
    tensors = stored((300, 192), torch.bfloat16, double_quant=True)
    change(tensors)
    with pytest.raises(QuantError) as refused:
        read(tensors, tmp_path)
    assert isinstance(refused.value, CorruptCheckpoint)
    assert PATH in str(refused.value)
    assert named in str(refused.value)


def test_fp4_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedQuantization, match=r"q_proj is in bitsandbytes fp4"):
        read(stored((64, 64), torch.bfloat16, double_quant=False, kind="fp4"), tmp_path)


def test_another_code_book_is_refused(tmp_path: Path) -> None:
    tensors = stored((64, 64), torch.bfloat16, double_quant=False)
    tensors["weight.quant_map"] = torch.linspace(-1, 1, 16)
    with pytest.raises(UnsupportedQuantization, match="quant_map is not NF4's"):
        read(tensors, tmp_path)


def test_codes_in_words_of_another_type(tmp_path: Path) -> None:
    """bnb_4bit_quant_storage: the same bytes as bfloat16, as FSDP wants them."""
    tensors = stored((64, 128), torch.bfloat16, double_quant=True)
    expected, _ = read(tensors, tmp_path)
    tensors["weight"] = tensors["weight"].view(-1).view(torch.bfloat16).view(-1, 1)
    matrix, _ = read(tensors, tmp_path)
    assert torch.equal(matrix.codes, expected.codes)
    assert isinstance(matrix.absmax, NestedScales)


def test_a_layer_left_alone_is_read_dense(tmp_path: Path) -> None:
    weight = torch.randn(8, 64).bfloat16()
    save_file({f"{PATH}.weight": weight}, tmp_path / SINGLE)
    matrix, taken = NF4.read(Checkpoint(tmp_path), PATH)
    assert torch.equal(matrix.dequantize(torch.bfloat16), weight)
    assert taken == {f"{PATH}.weight"}


def test_integers_that_nothing_describes_are_no_weights(tmp_path: Path) -> None:
    save_file({f"{PATH}.weight": torch.ones(8, 64, dtype=torch.uint8)}, tmp_path / SINGLE)
    with pytest.raises(UnsupportedQuantization, match=r"q_proj\.weight is torch\.uint8"):
        NF4.read(Checkpoint(tmp_path), PATH)
