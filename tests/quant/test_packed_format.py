"""GPTQ and AWQ matrices in a checkpoint: whole ones are read as they are, others refused by the tensor's name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from manylora.quant.checkpoint import Checkpoint
from manylora.quant.errors import CorruptCheckpoint
from manylora.quant.format import StoredFormat
from manylora.quant.weight_files import SINGLE
from tests.quant.packers import awq_tensors, gptq_tensors, random_codes

PATH = "model.layers.0.mlp.up_proj"
GPTQ = StoredFormat("gptq", 4, 32, 1)
AWQ = StoredFormat("awq", 4, 32)
Tensors = dict[str, Tensor]
Change = Callable[[Tensors], object]


def checkpoint(directory: Path, tensors: Tensors) -> Checkpoint:
    save_file({f"{PATH}.{name}": tensor.contiguous() for name, tensor in tensors.items()}, directory / SINGLE)
    return Checkpoint(directory)


def gptq(rows: int = 128, desc_act: bool = False) -> Tensors:
    return gptq_tensors(random_codes(rows, 16, 32, 4, sym=False, desc_act=desc_act), 1)


def awq() -> Tensors:
    return awq_tensors(random_codes(128, 16, 32, 4, sym=False, desc_act=False))


def test_gptq_without_g_idx_has_its_groups_in_order(tmp_path: Path) -> None:
    """80 inputs in groups of 32: the last group is short."""
    codes = random_codes(80, 16, 32, 4, sym=False, desc_act=False)
    tensors = gptq_tensors(codes, 1)
    del tensors["g_idx"]
    matrix, taken = GPTQ.read(checkpoint(tmp_path, tensors), PATH)
    assert torch.equal(matrix.dequantize(torch.float32), codes.weight())
    assert taken == {f"{PATH}.{name}" for name in tensors}


def test_gptq_with_g_idx(tmp_path: Path) -> None:
    codes = random_codes(128, 16, 32, 4, sym=False, desc_act=True)
    matrix, taken = GPTQ.read(checkpoint(tmp_path, gptq_tensors(codes, 1)), PATH)
    assert torch.equal(matrix.dequantize(torch.float32), codes.weight())
    assert f"{PATH}.g_idx" in taken


def test_awq(tmp_path: Path) -> None:
    codes = random_codes(128, 16, 32, 4, sym=False, desc_act=False)
    matrix, taken = AWQ.read(checkpoint(tmp_path, awq_tensors(codes)), PATH)
    assert torch.equal(matrix.dequantize(torch.float32), codes.weight())
    assert taken == {f"{PATH}.{name}" for name in ("qweight", "qzeros", "scales")}


@pytest.mark.parametrize("stored", [GPTQ, AWQ])
def test_a_layer_left_alone_is_read_dense(stored: StoredFormat, tmp_path: Path) -> None:
    weight = torch.randn(16, 128).half()
    matrix, taken = stored.read(checkpoint(tmp_path, {"weight": weight}), PATH)
    assert not matrix.is_quantized
    assert torch.equal(matrix.dequantize(torch.float16), weight)
    assert taken == {f"{PATH}.weight"}


def put(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def nan(scales: Tensor) -> Tensor:
    return scales.clone().index_fill_(0, torch.tensor([1]), torch.nan)


BOTH: list[tuple[Change, str]] = [
    (lambda tensors: tensors.pop("scales"), "scales"),
    (lambda tensors: tensors.pop("qzeros"), "qzeros"),
    (put("qweight", lambda words: words.long()), "qweight"),
    (put("qweight", lambda words: words[0]), "qweight"),
    (put("scales", lambda scales: scales[:-1]), "scales"),
    (put("scales", lambda scales: scales.to(torch.int16)), "scales"),
    (put("scales", nan), "scales holds NaN"),
    (put("qzeros", lambda words: words[:, :-1]), "qzeros"),
    (put("qzeros", lambda words: words.float()), "qzeros"),
]
ONLY_GPTQ: list[tuple[Change, str]] = [
    (put("g_idx", lambda index: index[:-1]), "g_idx"),
    (put("g_idx", lambda index: index + 1), "g_idx names a group"),
    (put("g_idx", lambda index: index - 1), "g_idx names a group"),
    (put("g_idx", lambda index: index.float()), "g_idx"),
]


def refusal(stored: StoredFormat, tensors: Tensors, directory: Path) -> str:
    with pytest.raises(CorruptCheckpoint) as refused:
        stored.read(checkpoint(directory, tensors), PATH)
    return str(refused.value)


@pytest.mark.parametrize(("change", "named"), BOTH + ONLY_GPTQ)
def test_malformed_gptq_is_refused_by_name(change: Change, named: str, tmp_path: Path) -> None:
    tensors = gptq()
    change(tensors)
    assert f"{PATH}.{named}" in refusal(GPTQ, tensors, tmp_path)


@pytest.mark.parametrize(("change", "named"), BOTH)
def test_malformed_awq_is_refused_by_name(change: Change, named: str, tmp_path: Path) -> None:
    tensors = awq()
    change(tensors)
    assert f"{PATH}.{named}" in refusal(AWQ, tensors, tmp_path)


def test_another_group_size_than_the_config_says(tmp_path: Path) -> None:
    assert f"{PATH}.qzeros" in refusal(StoredFormat("gptq", 4, 64, 1), gptq(), tmp_path)
    assert f"{PATH}.qzeros" in refusal(StoredFormat("awq", 4, -1), awq(), tmp_path)
    assert "groups of 48" in refusal(StoredFormat("awq", 4, 48), awq(), tmp_path)


def test_other_bits_than_the_config_says(tmp_path: Path) -> None:
    assert f"{PATH}.qzeros" in refusal(StoredFormat("gptq", 8, 32, 1), gptq(), tmp_path)


def test_desc_act_needs_its_index(tmp_path: Path) -> None:
    tensors = gptq()
    del tensors["g_idx"]
    assert f"'{PATH}.g_idx' is missing" in refusal(
        StoredFormat("gptq", 4, 32, 1, reordered=True), tensors, tmp_path
    )


def test_a_layer_that_is_nowhere(tmp_path: Path) -> None:
    assert f"'{PATH}.qweight' and '{PATH}.weight'" in refusal(GPTQ, {"other": torch.ones(1)}, tmp_path)


def test_packed_tensors_without_a_config_are_told(tmp_path: Path) -> None:
    assert "no quantization_config" in refusal(StoredFormat("dense"), gptq(), tmp_path)
