"""A merged model in transformers is base + adapter in transformers + peft, for every family and kind of adapter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from manylora.adapters.export.export import export
from manylora.adapters.pooling import read_pooling
from manylora.adapters.tokenizer import load_tokenizer
from manylora.quant.checkpoint import Checkpoint
from tests.adapters.export.making import FAMILIES, MIXED, load, logits_of, make_adapter, make_base, settings
from tests.adapters.making import pool

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def read(directory: Path, name: str) -> Any:
    return json.loads((directory / name).read_text())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [{}, {"use_rslora": True, **MIXED}], ids=["lora", "rslora-mixed"])
def test_every_family_merges_exactly_in_float32(tmp_path: Path, family: str, kind: dict[str, Any]) -> None:
    base = make_base(tmp_path / "base", family)
    adapted = make_adapter(tmp_path / "adapter", base, **kind)
    export(settings(base, tmp_path / "adapter", tmp_path / "out", dtype="float32"))
    torch.testing.assert_close(logits_of(load(tmp_path / "out")), logits_of(adapted), rtol=1e-4, atol=1e-4)
    config = read(tmp_path / "out", "config.json")
    assert config["tie_word_embeddings"] is FAMILIES[family].tied
    assert config["dtype"] == "float32"


def test_the_bases_dtype_is_kept_and_the_manifest_says_what_was_measured(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapted = make_adapter(tmp_path / "adapter", base)
    report = export(settings(base, tmp_path / "adapter", tmp_path / "out"))
    weight = Checkpoint(tmp_path / "out").read("model.layers.0.self_attn.q_proj.weight")
    assert weight.dtype == torch.bfloat16
    merged = adapted.merge_and_unload().model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(weight, merged.to(torch.bfloat16), rtol=0, atol=1e-3)
    manifest = read(tmp_path / "out", "manylora_export.json")
    assert manifest == json.loads(json.dumps(report.manifest))
    assert manifest["into"] == "16bit"
    assert 0 < manifest["logits"]["relative"] < 0.02 < manifest["adapter_effect"]["relative"]
    assert manifest["change_kept"] == pytest.approx(1, abs=0.02)
    assert len(manifest["change"]) == 14
    assert set(manifest["served"]["distance"]) == {"16bit", "dequantized"}
    assert manifest["served"]["nearer"] == "16bit"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"}


def test_the_adapter_s_own_tokenizer_goes_with_it_if_the_model_has_its_ids(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base)
    own: Any = load_tokenizer(base)
    own.eos_token = own.convert_ids_to_tokens(5)
    own.save_pretrained(tmp_path / "adapter")
    export(settings(base, tmp_path / "adapter", tmp_path / "out"))
    assert load_tokenizer(tmp_path / "out").eos_token == own.eos_token
    own.add_tokens([f"<new {i}>" for i in range(read(base, "config.json")["vocab_size"])])
    own.save_pretrained(tmp_path / "adapter")
    export(settings(base, tmp_path / "adapter", tmp_path / "other"))
    assert load_tokenizer(tmp_path / "other").get_vocab() == load_tokenizer(base).get_vocab()


def test_how_texts_are_pooled_goes_with_it_and_the_adapter_s_way_wins(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base)
    export(settings(base, tmp_path / "adapter", tmp_path / "silent"))
    assert read_pooling(tmp_path / "silent") is None
    pool(base, "lasttoken", "Transformer", "Pooling")
    export(settings(base, tmp_path / "adapter", tmp_path / "as-base"))
    assert read_pooling(tmp_path / "as-base") == "last"
    assert (tmp_path / "as-base" / "modules.json").read_bytes() == (base / "modules.json").read_bytes()
    pool(tmp_path / "adapter", "mean")
    export(settings(base, tmp_path / "adapter", tmp_path / "own"))
    assert read_pooling(tmp_path / "own") == "mean"
    assert not (tmp_path / "own" / "modules.json").exists()  # of whom says it, not of both


def test_shards_and_their_index_are_what_transformers_reads(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapted = make_adapter(tmp_path / "adapter", base)
    out = tmp_path / "out"
    export(settings(base, tmp_path / "adapter", out, dtype="float32", shard_bytes=200_000))
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 3
    assert read(out, "model.safetensors.index.json")["metadata"]["total_size"] < sum(
        shard.stat().st_size for shard in shards
    )
    torch.testing.assert_close(logits_of(load(out)), logits_of(adapted), rtol=1e-4, atol=1e-4)


def test_into_the_dequantised_base_is_what_a_4_bit_base_with_the_adapter_computes(tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    base = make_base(tmp_path / "base", dtype=torch.float32)
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = load(base, quantization_config=four_bit)
    for module in model.modules():
        # Else bitsandbytes computes in bfloat16 on a CPU, whatever the compute dtype.
        module.support_avx512bf16_for_cpu = False
    adapted = make_adapter(tmp_path / "adapter", base, model=model)
    out = tmp_path / "out"
    report = export(settings(base, tmp_path / "adapter", out))
    torch.testing.assert_close(logits_of(load(out)), logits_of(adapted), rtol=1e-3, atol=1e-3)
    assert report.manifest["into"] == "dequantized"
    assert "quantization_config" not in read(out, "config.json")


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
def test_merged_4bit_is_read_by_bitsandbytes_and_by_us(tmp_path: Path, double_quant: bool) -> None:
    from manylora.adapters.export.base import BaseCheckpoint
    from manylora.adapters.export.rows import chunks

    base = make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base)
    out = tmp_path / "out"
    report = export(
        settings(base, tmp_path / "adapter", out, format="merged-4bit", double_quant=double_quant)
    )
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.is_loaded_in_4bit
    ours = BaseCheckpoint(out)
    import bitsandbytes

    weight = model.model.layers[1].mlp.down_proj.weight
    theirs = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    rows = ours.rows("model.layers.1.mlp.down_proj.weight")
    found = torch.cat([rows.rows(first, last) for first, last in chunks(rows.shape)])
    torch.testing.assert_close(found, theirs, rtol=1e-2, atol=1e-3)
    assert report.manifest["logits"]["relative"] < 0.5  # type: ignore[index]  # JSON
    assert read(out, "config.json")["quantization_config"]["bnb_4bit_use_double_quant"] is double_quant


def test_dora_is_merged_exactly(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=torch.float32)
    adapted = make_adapter(tmp_path / "adapter", base, use_dora=True)
    export(settings(base, tmp_path / "adapter", tmp_path / "out"))
    torch.testing.assert_close(logits_of(load(tmp_path / "out")), logits_of(adapted), rtol=1e-3, atol=1e-3)


def test_trained_biases_and_norms_are_taken_over(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=torch.float32)
    adapted = make_adapter(tmp_path / "adapter", base, bias="all", modules_to_save=["model.norm"])
    export(settings(base, tmp_path / "adapter", tmp_path / "out"))
    torch.testing.assert_close(logits_of(load(tmp_path / "out")), logits_of(adapted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}, True),
    ],
    ids=[
        "head",
        "embedding",
        "head-saved",
        "embedding-saved",
        "kept-tied",
        "both-saved",
        "embedding-tied",
        "head-tied",
    ],
)
def test_a_tied_head_that_drifted_is_untied_in_the_config(
    tmp_path: Path, config: dict[str, Any], tied: bool
) -> None:
    base = make_base(tmp_path / "base", dtype=torch.float32)
    adapted = make_adapter(tmp_path / "adapter", base, **config)
    report = export(settings(base, tmp_path / "adapter", tmp_path / "out"))
    torch.testing.assert_close(logits_of(load(tmp_path / "out")), logits_of(adapted), rtol=1e-4, atol=1e-4)
    assert read(tmp_path / "out", "config.json")["tie_word_embeddings"] is tied
    assert report.manifest["head"] == ("tied" if tied else "untied by this merge")
    assert ("lm_head.weight" in Checkpoint(tmp_path / "out").names()) is not tied


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "saved"])
@pytest.mark.parametrize("family", ["qwen2", "qwen2-untied"])
def test_a_vocabulary_that_grew_comes_with_its_embedding_and_tokenizer(
    tmp_path: Path, family: str, trained: bool
) -> None:
    base = make_base(tmp_path / "base", family, dtype=torch.float32)
    model = load(base)
    model.resize_token_embeddings(330)
    tied = FAMILIES[family].tied
    saved: dict[str, Any] = {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": tied}
    adapted = make_adapter(tmp_path / "adapter", base, model=model, **(saved if trained else {}))
    (tmp_path / "adapter" / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes() + b"\n")
    out = tmp_path / "out"
    export(settings(base, tmp_path / "adapter", out))
    torch.testing.assert_close(logits_of(load(out)), logits_of(adapted), rtol=1e-4, atol=1e-4)
    config = read(out, "config.json")
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (330, tied)
    assert (out / "tokenizer.json").read_bytes().endswith(b"\n")
