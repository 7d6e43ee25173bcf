"""An adapter for llama.cpp: its arithmetic on the file gives what peft adds, and what it can't hold is refused.

That llama.cpp itself gives the same tokens is `python -m manylora.loadtest.checks.gguf_adapter`.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGUFReader
from peft.tuners.lora import LoraLayer

from manylora.adapters.errors import UnsupportedAdapter
from manylora.adapters.export.errors import ExportFailed, ExportRefused
from manylora.adapters.export.export import export
from manylora.adapters.export.settings import ExportPart, ExportSettings
from tests.adapters.export.making import FAMILIES, MIXED, make_adapter, make_base, settings

NAMES = {
    **{f"self_attn.{each}_proj": f"attn_{each}" for each in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{each}_proj": f"ffn_{each}" for each in ("gate", "up", "down")},
}
"""llama.cpp's, of a layer's matrices."""
ARCHITECTURES = {
    "qwen2": "qwen2",
    "qwen2-untied": "qwen2",
    "qwen3": "qwen3",
    "llama": "llama",
    "mistral": "llama",
}


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama", "mistral"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def field(reader: GGUFReader, key: str) -> Any:
    found = reader.get_field(key)
    assert found is not None, key
    return found.contents()


def deltas_in(path: Path) -> dict[str, torch.Tensor]:
    """What llama.cpp adds to each of its matrices: α/r · B A, α the file's and r the matrix's own."""
    reader = GGUFReader(path)
    alpha = field(reader, "adapter.lora.alpha")
    tensors = {
        each.name: torch.from_numpy(gguf.dequantize(each.data, each.tensor_type).copy()).double()
        for each in reader.tensors
    }
    names = {name.rsplit(".weight.", 1)[0] for name in tensors}
    found = {}
    for name in names:
        a, b = (tensors.pop(f"{name}.weight.lora_{half}") for half in "ab")
        a, b = (b.T, a) if name == "token_embd" else (a, b)
        found[name] = alpha / a.shape[0] * (b @ a)
    assert not tensors
    return found


def wanted(model: Any, family: str) -> dict[str, torch.Tensor]:
    """What peft adds, by llama.cpp's names and with q and k of a llama in its order of rows."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            found[named(path)] = in_order(
                named(path), module.get_delta_weight("default").detach().double(), family
            )
    return found


def named(path: str) -> str:
    if path.endswith(("embed_tokens", "lm_head")):
        return {"embed_tokens": "token_embd", "lm_head": "output"}[path.rsplit(".", 1)[-1]]
    layer, _, module = path.partition(".layers.")[2].partition(".")
    return f"blk.{layer}.{NAMES[module]}"


def in_order(name: str, delta: torch.Tensor, family: str) -> torch.Tensor:
    if ARCHITECTURES[family] != "llama" or not name.endswith(("attn_q", "attn_k")):
        return delta
    shape = FAMILIES[family]
    heads = shape.num_heads if name.endswith("attn_q") else shape.num_kv_heads
    out, wide = delta.shape
    # Row i of a head's first half, row i of its second, row i + 1 of the first, …
    return delta.reshape(heads, 2, out // heads // 2, wide).transpose(1, 2).reshape(out, wide)


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert float((found[name] - delta).norm()) <= tolerance * float(delta.norm()), name


def made(base: Path, adapter: Path, output: Path, **more: Any) -> dict[str, Any]:
    return dict(export(settings(base, adapter, output, format="gguf-lora", **more)).manifest)


def test_the_file_is_what_peft_adds_with_ranks_and_alphas_of_each_matrix(family: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", family)
    model = make_adapter(tmp_path / "adapter", base, **MIXED)
    manifest = made(base, tmp_path / "adapter", tmp_path / "out.gguf")
    close(deltas_in(tmp_path / "out.gguf"), wanted(model, family))
    assert manifest["error"]["overall"] < 1e-6
    assert manifest["left_out"] == ["manylora_base.json"]
    reader = GGUFReader(tmp_path / "out.gguf")
    said = {key: field(reader, key) for key in ("general.type", "adapter.type", "general.architecture")}
    assert said == {
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.architecture": ARCHITECTURES[family],
    }
    # The alpha of most matrices; theirs is not touched.
    assert field(reader, "adapter.lora.alpha") == manifest["alpha"] == 16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out.gguf"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rslora_and_an_alpha_of_nothing_in_16_bits(tmp_path: Path, dtype: str) -> None:
    base = make_base(tmp_path / "base")
    more: dict[str, Any] = {"use_rslora": True, "alpha_pattern": {"q_proj": 0, "v_proj": 3}}
    model = make_adapter(tmp_path / "adapter", base, **more)
    made(base, tmp_path / "adapter", tmp_path / "out.gguf", dtype=dtype)
    expected = wanted(model, "qwen2")
    close(deltas_in(tmp_path / "out.gguf"), expected, 0.01)
    assert not expected["blk.0.attn_q"].any(), "an alpha of 0 in the file would be a scale of 1"


def test_factors_of_an_embedding_and_of_a_head_of_its_own(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2-untied")
    model = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "embed_tokens", "lm_head"])
    made(base, tmp_path / "adapter", tmp_path / "out.gguf")
    found, expected = deltas_in(tmp_path / "out.gguf"), wanted(model, "qwen2-untied")
    expected["token_embd"] = expected["token_embd"].reshape(found["token_embd"].shape)
    close(found, expected)


def test_an_activated_adapter_says_from_which_tokens_on_it_acts(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, alora_invocation_tokens=[5, 17])
    made(base, tmp_path / "adapter", tmp_path / "out.gguf")
    assert field(GGUFReader(tmp_path / "out.gguf"), "adapter.alora.invocation_tokens") == [5, 17]
    assert GGUFReader(tmp_path / "out.gguf").get_field("adapter.lora.alpha") is not None
    for more in ({"format": "merged"}, {"format": "gguf-lora", "adapter": None, "parts": "both"}):
        asked: dict[str, Any] = {
            "adapter": tmp_path / "adapter",
            "output": tmp_path / "no.gguf",
            "base": base,
            **more,
        }
        if asked.get("parts"):
            asked["parts"] = (ExportPart("a", tmp_path / "adapter", 0.5),)
        with pytest.raises(UnsupportedAdapter, match="can't be merged"):
            export(ExportSettings(**asked))


def test_a_mixture_is_one_file(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama")
    parts: list[ExportPart] = []
    expected: dict[str, torch.Tensor] = {}
    kinds: dict[float, dict[str, Any]] = {0.7: {"r": 2}, -0.4: {"target_modules": ["k_proj", "up_proj"]}}
    for seed, (weight, more) in enumerate(kinds.items()):
        model = make_adapter(tmp_path / str(seed), base, seed=seed, **more)
        parts.append(ExportPart(str(seed), tmp_path / str(seed), weight))
        for name, delta in wanted(model, "llama").items():
            expected[name] = expected.get(name, torch.zeros(())) + parts[-1].weight * delta
    asked = ExportSettings(None, tmp_path / "out.gguf", base, "gguf-lora", parts=tuple(parts))
    manifest = export(asked).manifest
    close(deltas_in(tmp_path / "out.gguf"), expected)
    assert manifest["combine"] == "cat"
    assert [part["name"] for part in manifest["adapter"]["parts"]] == ["0", "1"]  # type: ignore[index]
    assert not list(tmp_path.glob(".partial*"))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["input_layernorm"]}, "input_layernorm.weight whole"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight, and in this base"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens.weight, and in this base"),
    ],
    ids=["dora", "whole", "head", "tied"],
)
def test_what_has_no_place_in_it_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    base = make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, **config)
    with pytest.raises(ExportRefused, match=says):
        made(base, tmp_path / "adapter", tmp_path / "out.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_what_is_asked_wrongly_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, strength=1e5)
    adapter = tmp_path / "adapter"
    with pytest.raises(ExportRefused, match=r"ends in \.gguf"):
        made(base, adapter, tmp_path / "out")
    with pytest.raises(ExportRefused, match="base's directory"):
        export(ExportSettings(adapter, tmp_path / "out.gguf", format="gguf-lora"))
    with pytest.raises(ExportFailed, match="overflows"):
        made(base, adapter, tmp_path / "out.gguf", dtype="float16")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(ExportRefused, match="gpt2"):
        made(base, adapter, tmp_path / "out.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
