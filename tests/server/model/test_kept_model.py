"""What a start prepared is mapped by the next one: the same bits, whatever the form, and never another model's."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from manylora.server.kernels.choose import choose_backend
from manylora.server.kernels.cpu.backend import CpuBackend
from manylora.server.model.decoder import Decoder
from manylora.server.model.kept_model import put_together, take_apart
from manylora.server.model.loader import LoadReport, Quantization, load_weights
from manylora.server.model.reader import Reader
from manylora.server.model.served import ServedModel
from manylora.server.model.weight_cache import WeightCache
from tests.quant.packers import awq_tensors, gptq_tensors, nearest_codes
from tests.server.model.models import random_model
from tests.server.model.peft_models import nf4_model
from tests.server.model.quantized_models import save_quantized
from tests.server.model.steps import BLOCK, BLOCKS_EACH, CPU, Stream, all_logits, step

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


@pytest.fixture
def backend() -> CpuBackend:
    found = choose_backend(CPU, torch.bfloat16)
    if not isinstance(found, CpuBackend):
        pytest.skip(found.description)
    return found


@pytest.fixture
def cache(tmp_path: Path) -> WeightCache:
    return WeightCache(tmp_path / "kept", 1 << 30)


def save(family: str, directory: Path) -> Path:
    random_model(family, torch.bfloat16).save_pretrained(directory)
    return directory


def save_nf4(directory: Path) -> None:
    base = save("qwen2", directory.with_name("base"))
    nf4_model(base, double_quant=True).save_pretrained(directory)


def save_gptq(directory: Path) -> None:
    quantize = partial(nearest_codes, bits=4, group_size=32, desc_act=True)
    save_quantized("qwen2", directory, GPTQ, quantize, partial(gptq_tensors, zero_offset=1))


def save_awq(directory: Path) -> None:
    save_quantized("llama2", directory, AWQ, partial(nearest_codes, bits=4, group_size=32), awq_tensors)


def load(
    directory: Path, backend: CpuBackend, cache: WeightCache | None, quantization: Quantization = "auto"
) -> tuple[torch.Tensor, LoadReport]:
    """Return logits and the report."""
    config, weights, report = load_weights(directory, backend, quantization=quantization, cache=cache)
    decoder = Decoder(config, weights, backend)
    stream = Stream(0, list(range(3, 43)))
    step(ServedModel(decoder, decoder.new_kv(BLOCKS_EACH, BLOCK), decoder.new_arena(8)), [(stream, 40)])
    return all_logits(stream), report


def mapped(directory: Path, backend: CpuBackend, cache: WeightCache, **more: Any) -> bool:
    found = load(directory, backend, cache, **more)[1].mapped
    cache.write()
    return found


MODELS: dict[str, tuple[Callable[[Path], object], Quantization]] = {
    "nf4": (partial(save, "qwen2"), "auto"),
    "nf4 with q and k norms": (partial(save, "qwen3"), "nf4"),
    "nf4 with biases and a window": (partial(save, "qwen2-window"), "nf4"),
    "nf4 with biases everywhere": (partial(save, "llama-linear"), "nf4"),
    "nf4 with its own head": (partial(save, "llama2"), "nf4"),
    "int8": (partial(save, "mistral"), "int8"),
    "nf4 of the file": (save_nf4, "auto"),
    "gptq": (save_gptq, "auto"),
    "awq": (save_awq, "auto"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_next_start_computes_the_same(
    name: str, backend: CpuBackend, cache: WeightCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, quantization = MODELS[name]
    directory = tmp_path / "model"
    make(directory)
    plain, without = load(directory, backend, None, quantization)
    first, report = load(directory, backend, cache, quantization)
    assert not report.mapped
    assert torch.equal(first, plain)
    cache.write()

    def refuse(reader: Reader) -> None:
        raise AssertionError("the checkpoint was read")

    monkeypatch.setattr(Reader, "decoder", refuse)
    second, again = load(directory, backend, cache, quantization)
    assert again.mapped
    assert torch.equal(second, first)
    for field in ("format", "kind", "linear_bytes", "linear_weights", "other_bytes", "notes", "from_16bit"):
        assert getattr(again, field) == getattr(report, field) == getattr(without, field)


def test_weights_that_are_not_quantised_are_not_kept(
    backend: CpuBackend, cache: WeightCache, tmp_path: Path
) -> None:
    directory = save("qwen2", tmp_path / "model")
    load(directory, backend, cache, "none")
    cache.write()
    assert cache.entries() == []


def test_plain_torch_keeps_nothing(cache: WeightCache, tmp_path: Path) -> None:
    directory = save("qwen2", tmp_path / "model")
    load_weights(directory, choose_backend(CPU, torch.bfloat16, "plain"), cache=cache)
    cache.write()
    assert cache.entries() == []


def touch(directory: Path) -> None:
    os.utime(directory / "model.safetensors", (1000, 1000))


def change_a_weight(directory: Path) -> None:
    """Change the last value of a norm, and put the file's time back."""
    path = directory / "model.safetensors"
    before = path.stat()
    tensors = load_file(path)
    tensors["model.norm.weight"][-1] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def change_config(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-3}))


@pytest.mark.parametrize("change", [touch, change_a_weight, change_config])
def test_another_checkpoint_is_prepared_anew(
    change: Callable[[Path], None], backend: CpuBackend, cache: WeightCache, tmp_path: Path
) -> None:
    directory = save("qwen2", tmp_path / "model")
    assert not mapped(directory, backend, cache)
    assert mapped(directory, backend, cache)
    change(directory)
    assert not mapped(directory, backend, cache)
    assert torch.equal(load(directory, backend, cache)[0], load(directory, backend, None)[0])


def test_another_form_or_layout_is_prepared_anew(
    backend: CpuBackend, cache: WeightCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save("qwen2", tmp_path / "model")
    assert not mapped(directory, backend, cache)
    assert not mapped(directory, backend, cache, quantization="int8")
    assert mapped(directory, backend, cache)
    other = choose_backend(CPU, torch.float32)
    assert isinstance(other, CpuBackend)
    assert not mapped(directory, other, cache)  # quantised from other values
    monkeypatch.setattr(backend.keeper, "_layout", "another")
    assert not mapped(directory, backend, cache)
    assert len(cache.entries()) == 4


def test_the_key_does_not_depend_on_where_a_checkpoint_lies(
    backend: CpuBackend, cache: WeightCache, tmp_path: Path
) -> None:
    directory = save("qwen2", tmp_path / "model")
    assert not mapped(directory, backend, cache)
    directory.rename(tmp_path / "elsewhere")
    assert mapped(tmp_path / "elsewhere", backend, cache)


@pytest.mark.parametrize(
    "other",
    [
        {"vocab_size": 96},
        {"hidden_size": 192},
        {"intermediate_size": 64},
        {"num_layers": 9},
        {"num_heads": 8},
    ],
)
def test_only_a_model_of_the_same_shape_is_put_together(
    other: dict[str, Any], backend: CpuBackend, tmp_path: Path
) -> None:
    config, weights, _ = load_weights(save("qwen2", tmp_path / "model"), backend)
    kept = take_apart(weights, backend.keeper)
    assert put_together(kept, config, backend, backend.keeper).shape == config.shape
    with pytest.raises(ValueError, match="is"):
        put_together(kept, replace(config, **other), backend, backend.keeper)


def test_kept_weights_under_anothers_name_are_thrown_away(
    backend: CpuBackend, cache: WeightCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a fault of ours would leave them."""
    one, two = save("qwen2", tmp_path / "one"), save("qwen3", tmp_path / "two")
    for directory in (one, two):
        assert not mapped(directory, backend, cache)
    kept = tmp_path / "kept"
    keys = {json.dumps(dict(cache.about(entry.key))): entry.key for entry in cache.entries()}
    of_one, of_two = (next(key for about, key in keys.items() if name in about) for name in ("one", "two"))
    raw = (kept / f"{of_two}.weights").read_bytes()
    (kept / f"{of_one}.weights").write_bytes(raw)
    assert not mapped(one, backend, cache)
    assert "thrown away" in caplog.text
    assert mapped(one, backend, cache)
