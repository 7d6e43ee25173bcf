"""Loading is strict and names what is wrong, and takes the 4-bit model and one fused matrix."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from manylora.quant.errors import CorruptCheckpoint, QuantError, UnsupportedQuantization
from manylora.server.kernels.choose import choose_backend
from manylora.server.kernels.plain import PlainBackend
from manylora.server.kernels.plain.linear import DenseLinear
from manylora.server.kernels.weights import DecoderWeights
from manylora.server.model.errors import ModelError, ModelMissing
from manylora.server.model.loader import LoadReport, Quantization, load_weights, read_config
from tests.server.model.models import random_model, save_model
from tests.server.model.steps import Stream, all_logits, load, step

CPU = torch.device("cpu")
SINGLE = "model.safetensors"


def embedding_of(weights: DecoderWeights) -> Tensor:
    assert isinstance(weights.embedding, Tensor)
    return weights.embedding


def head_of(weights: DecoderWeights) -> Tensor:
    assert isinstance(weights.head, DenseLinear)
    return weights.head.weight


def save_single(family: str, directory: Path) -> torch.nn.Module:
    model: torch.nn.Module = random_model(family)
    model.save_pretrained(directory)  # type: ignore[operator]
    return model


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE)


def change_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def read(directory: Path, quantization: Quantization = "none") -> tuple[DecoderWeights, LoadReport]:
    _, weights, report = load_weights(directory, PlainBackend(CPU, torch.float32), quantization=quantization)
    return weights, report


def refusal(directory: Path, quantization: Quantization = "none") -> str:
    with pytest.raises((ModelError, QuantError)) as refused:
        read(directory, quantization)
    return str(refused.value)


def logits(directory: Path) -> Tensor:
    stream = Stream(0, list(range(20)))
    step(load(directory), [(stream, 20)])
    return all_logits(stream)


def test_the_files_chosen_are_those_that_transformers_chooses(tmp_path: Path) -> None:
    random_model("llama2").save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    newer = random_model("llama2")
    with torch.no_grad():
        for parameter in newer.parameters():
            parameter.mul_(1.5)
    newer.save_pretrained(tmp_path)  # leaves the index of the first
    weights, report = read(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(embedding_of(weights), theirs.model.embed_tokens.weight)
    assert torch.equal(embedding_of(weights), newer.model.embed_tokens.weight)
    assert len(report.notes) == 1
    assert "model.safetensors.index.json is not read" in report.notes[0]


def test_one_file_or_many_shards_are_the_same_model(tmp_path: Path) -> None:
    save_single("qwen3", tmp_path / "one")
    save_model("qwen3", tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert torch.equal(logits(tmp_path / "one"), logits(tmp_path / "many"))


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("family", ["qwen2", "llama2"])
@pytest.mark.parametrize("kernels", ["plain", "auto"])
def test_no_file_stays_mapped(family: str, quantization: Quantization, kernels: str, tmp_path: Path) -> None:
    model: Any = random_model(family)
    model.bfloat16().save_pretrained(tmp_path)
    backend = choose_backend(CPU, torch.bfloat16, kernels)
    held = load_weights(tmp_path, backend, quantization=quantization)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert held[1].layers


def test_progress_counts_bytes(tmp_path: Path) -> None:
    save_single("qwen2", tmp_path)
    seen: list[tuple[int, int]] = []
    load_weights(
        tmp_path, PlainBackend(CPU, torch.float32), progress=lambda done, total: seen.append((done, total))
    )
    done, totals = zip(*seen, strict=True)
    assert set(totals) == {(tmp_path / SINGLE).stat().st_size}
    assert list(done) == sorted(done)
    assert len(done) > 3 * 7
    header = totals[0] - sum(tensor.nbytes for tensor in load_file(tmp_path / SINGLE).values())
    assert done[-2:] == (totals[0] - header, totals[0])


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.2.self_attn.k_proj.weight",
        "model.layers.0.mlp.down_proj.weight",
    ],
)
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    save_single("llama2", tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.pop(name))
    message = refusal(tmp_path)
    assert name in message
    assert str(tmp_path) in message


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen2", "model.layers.0.self_attn.q_proj.bias"),
        ("llama-linear", "model.layers.0.mlp.up_proj.bias"),
        ("qwen3", "model.layers.1.self_attn.q_norm.weight"),
    ],
)
def test_a_missing_bias_or_norm_is_named(family: str, name: str, tmp_path: Path) -> None:
    save_single(family, tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.pop(name))
    assert name in refusal(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.3.mlp.up_proj.weight",
        "score.weight",
        "model.layers.0.self_attn.q_norm.weight",
    ],
)
def test_a_left_over_tensor_is_named_with_its_file(name: str, tmp_path: Path) -> None:
    save_single("llama2", tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update({name: torch.zeros(128)}))
    message = refusal(tmp_path)
    assert name in message
    assert str(tmp_path / SINGLE) in message


def test_many_left_over_tensors_are_counted(tmp_path: Path) -> None:
    save_single("llama2", tmp_path)
    change_config(tmp_path, num_hidden_layers=1)
    message = refusal(tmp_path)
    assert "model.layers.1.input_layernorm.weight" in message
    assert "and 13 more" in message


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.2.self_attn.v_proj.weight",
        "model.layers.0.mlp.gate_proj.weight",
    ],
)
def test_a_wrong_shape_is_named_with_its_file_and_both_shapes(name: str, tmp_path: Path) -> None:
    save_single("llama2", tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update({name: tensors[name][:-2].clone()}))
    message = refusal(tmp_path, "nf4")
    assert f"{tmp_path / SINGLE}: {name} is [" in message
    assert "but the config says [" in message


def test_weights_that_are_not_numbers_are_named(tmp_path: Path) -> None:
    save_single("llama2", tmp_path)
    name = "model.layers.1.self_attn.o_proj.weight"
    change_tensors(tmp_path, lambda tensors: tensors[name].view(-1)[7:8].fill_(torch.nan))
    with pytest.raises(CorruptCheckpoint, match=rf"{name}: the weight holds NaN"):
        read(tmp_path, "nf4")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_weights_of_another_type_are_refused_by_name(dtype: torch.dtype, tmp_path: Path) -> None:
    save_single("llama2", tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    change_tensors(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(UnsupportedQuantization, match=f"{name} is {dtype}"):
        read(tmp_path)


def test_buffers_of_old_checkpoints_are_passed_over(tmp_path: Path) -> None:
    save_single("llama2", tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(tmp_path, lambda tensors: tensors.update({name: torch.ones(16)}))
    read(tmp_path)


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    save_single("qwen2", tmp_path)
    weights, report = read(tmp_path)
    assert head_of(weights).data_ptr() == embedding_of(weights).data_ptr()
    head = embedding_of(weights).clone()
    # A copy of it in the file changes nothing, nor does it take memory.
    change_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": head}))
    again, same = read(tmp_path)
    assert head_of(again).data_ptr() == embedding_of(again).data_ptr()
    assert same.other_bytes == report.other_bytes


def test_a_tied_matrix_under_the_heads_name(tmp_path: Path) -> None:
    save_single("qwen2", tmp_path)
    expected = logits(tmp_path)
    change_tensors(
        tmp_path,
        lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}),
    )
    assert torch.equal(logits(tmp_path), expected)


def test_a_head_that_differs_is_not_tied(tmp_path: Path) -> None:
    """As transformers does it, whatever the config says."""
    save_single("qwen2", tmp_path)
    expected = logits(tmp_path)
    change_tensors(
        tmp_path,
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] * 2}),
    )
    assert torch.equal(logits(tmp_path), expected * 2)


def test_untied_heads_are_their_own(tmp_path: Path) -> None:
    save_single("llama2", tmp_path)
    weights, report = read(tmp_path)
    assert not torch.equal(head_of(weights), embedding_of(weights))
    assert report.other_bytes == 4 * (2 * 320 * 128 + 7 * 128)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "is missing"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("\x00", "is not JSON"),
        ("[]", "is not an object"),
    ],
)
def test_a_config_that_is_none(text: str | None, named: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelMissing, match=named):
        read_config(tmp_path)


def test_a_config_that_may_not_be_read_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelMissing, match="can't be read: Is a directory"):
        read_config(tmp_path)


def test_missing_shards_and_pickles_stop_the_load(tmp_path: Path) -> None:
    save_model("llama2", tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.rename(tmp_path / "gone")
    assert f"{shard} is missing" in refusal(tmp_path)
    shard.write_bytes((tmp_path / "gone").read_bytes()[:-100])
    assert f"{shard} is not a whole safetensors file" in refusal(tmp_path)


def test_the_report_says_what_is_held(tmp_path: Path) -> None:
    save_single("llama2", tmp_path)
    _, dense = read(tmp_path)
    _, nf4 = read(tmp_path, "nf4")
    assert (dense.format, dense.bits_per_weight) == ("float32", 32)
    assert (nf4.format, nf4.bits_per_weight) == ("nf4", 4.5)
    assert dense.linear_weights == nf4.linear_weights == 3 * (4 * 128 * 128 + 3 * 128 * 192)
