"""Loading bases: every format equals transformers' own numbers, and what can't be trained on is refused in a line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from manylora.loadtest.material.gptq_copy import write_gptq_copy
from manylora.server.tokenizer import Tokenizer
from manylora.training.bases.load import BaseSettings, load_base, load_tokenizer
from manylora.training.bases.precision import choose_dtype
from manylora.training.bases.quantized import QuantizedLinear
from manylora.training.errors import BaseRefused
from tests.server.model.steps import Stream, all_logits, step
from tests.server.model.steps import load as load_served
from tests.training.bases.making import FAMILIES, IDS, load, write_awq, write_dense, write_gptq

CPU = torch.device("cpu")
DEMO = Path(__file__).resolve().parents[3] / "demo"


def change_config(directory: Path, **changes: Any) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


@pytest.mark.parametrize("kind", ["dense", "gptq", "awq", "gptq-reordered", "gptq8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_computes_what_the_server_computes(family: str, kind: str, tmp_path: Path) -> None:
    tied = family in ("qwen2", "qwen3")
    directory = write_dense(tmp_path / "dense", family, tied=tied)
    if kind.startswith("gptq"):
        directory = write_gptq(
            directory,
            tmp_path / "packed",
            bits=8 if kind == "gptq8" else 4,
            desc_act=kind == "gptq-reordered",
        )
    elif kind == "awq":
        directory = write_awq(directory, tmp_path / "packed")
    base = load(directory)
    assert base.kind == ("gptq" if kind.startswith("gptq") else kind)
    assert not any(each.requires_grad for each in base.model.parameters())
    packed = [each for each in base.model.modules() if isinstance(each, QuantizedLinear)]
    assert len(packed) == (0 if kind == "dense" else 14)
    stream = Stream(0, IDS[0].tolist())
    step(load_served(directory, quantization="auto" if packed else "none"), [(stream, IDS.shape[1])])
    with torch.no_grad():
        ours = base.model(input_ids=IDS[:1]).logits[0]
    torch.testing.assert_close(ours, all_logits(stream), rtol=0, atol=1e-4)


@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_prequantised_and_quantised_while_loading_are_one(
    double_quant: bool, dense_dir: Path, tmp_path: Path
) -> None:
    base = load_base(
        BaseSettings(str(dense_dir), q_lora=True, dtype="bf16", double_quant=double_quant, device=CPU)
    )
    assert (base.kind, base.double_quant, base.from_16bit) == ("nf4", double_quant, True)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant
    )
    AutoModelForCausalLM.from_pretrained(
        dense_dir, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    ).save_pretrained(tmp_path / "nf4")
    shutil.copytree(
        dense_dir,
        tmp_path / "nf4",
        ignore=lambda *_: ["config.json", "model.safetensors"],
        dirs_exist_ok=True,
    )
    stored = load_base(BaseSettings(str(tmp_path / "nf4"), dtype="bf16", device=CPU))
    assert (stored.kind, stored.double_quant, stored.from_16bit) == ("nf4", double_quant, False)
    assert any("without --q_lora" in note for note in stored.notes)
    with torch.no_grad():
        assert torch.equal(stored.model(input_ids=IDS).logits, base.model(input_ids=IDS).logits)


def test_embeddings_head_and_norms_stay_in_the_bases_type(directories: dict[str, Path]) -> None:
    for kind in ("dense", "nf4", "gptq", "awq"):
        base = load_base(BaseSettings(str(directories[kind]), q_lora=kind == "nf4", dtype="bf16", device=CPU))
        plain = {
            name: each.dtype
            for name, each in base.model.named_parameters()
            if name.endswith(("embed_tokens.weight", "norm.weight", "layernorm.weight"))
        }
        assert set(plain.values()) == {torch.bfloat16}


def test_a_cpu_trains_in_bf16_where_fp16_was_asked_for(dense_dir: Path) -> None:
    base = load_base(BaseSettings(str(dense_dir), dtype="fp16", device=CPU))
    assert base.dtype == torch.bfloat16
    assert any("bfloat16 is used instead of --fp16" in note for note in base.notes)
    assert choose_dtype("fp16", torch.device("cuda")) == (torch.float16, ())
    assert choose_dtype("fp32", CPU) == (torch.float32, ())


def test_the_fingerprint_is_that_of_config_and_weights(dense_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(dense_dir, tmp_path / "copy")
    assert load(copy).fingerprint == load(dense_dir).fingerprint
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert load(copy).fingerprint != load(dense_dir).fingerprint


def refusal(directory: Path | str, **settings: Any) -> str:
    with pytest.raises(BaseRefused) as refused:
        load_base(BaseSettings(str(directory), device=CPU, **settings))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_base_that_is_missing(tmp_path: Path) -> None:
    assert "no such directory" in refusal(tmp_path / "nowhere")
    assert "OWNER/MODEL" in refusal("nowhere")
    assert "config.json is missing" in refusal(tmp_path)


def test_the_first_qwen_is_named_with_its_successor(dense_dir: Path, tmp_path: Path) -> None:
    qwen = change_config(shutil.copytree(dense_dir, tmp_path / "Qwen-7B"), model_type="qwen")
    said = refusal(qwen)
    assert "Qwen2.5" in said
    assert "--trust_remote_code" in said
    other = change_config(qwen, model_type="unheard-of")
    assert "isn't known here" in refusal(other)


def test_pickled_and_broken_weights(dense_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(dense_dir, tmp_path / "copy")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "pickle" in refusal(copy)
    (copy / "model.safetensors").write_bytes((dense_dir / "model.safetensors").read_bytes()[:5000])
    assert "not a whole safetensors file" in refusal(copy)
    (copy / "tokenizer.json").unlink()
    shutil.copy(dense_dir / "model.safetensors", copy)
    assert "tokenizer" in refusal(copy)


def test_an_older_index_beside_the_weights_is_passed_over_and_noted(dense_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dense_dir, tmp_path / "copy"))
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"old": "gone.safetensors"}}')
    base = load_base(BaseSettings(str(copy), device=CPU))
    assert any("model.safetensors.index.json is not read" in note for note in base.notes)
    assert base.fingerprint == load_base(BaseSettings(str(dense_dir), device=CPU)).fingerprint


def test_a_packed_checkpoint_that_lacks_something(directories: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(directories["gptq"], tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")

    def write(**changes: torch.Tensor | None) -> None:
        changed = {name: each for name, each in {**tensors, **changes}.items() if each is not None}
        save_file(changed, copy / "model.safetensors", metadata={"format": "pt"})

    name = "model.layers.1.mlp.down_proj.scales"
    write(**{name: None})
    assert name in refusal(copy)
    write(**{"model.layers.7.norm.weight": torch.ones(2)})
    assert "model.layers.7.norm.weight" in refusal(copy)
    write(**{"model.norm.weight": torch.ones(2)})
    assert "config.json says [64]" in refusal(copy)
    write(**{"model.layers.0.mlp.up_proj.bias": torch.ones(96)})
    assert "is not zero" in refusal(copy)
    write(**{"model.layers.0.mlp.up_proj.bias": torch.zeros(96)})
    load(copy)


def test_what_fsdp_can_shard(directories: dict[str, Path]) -> None:
    assert "plain DDP or ZeRO-2" in refusal(directories["gptq"], fsdp=True)
    base = load_base(BaseSettings(str(directories["nf4"]), q_lora=True, dtype="bf16", device=CPU, fsdp=True))
    codes = [each for each in base.model.parameters() if hasattr(each, "quant_state")]
    assert codes
    assert {each.dtype for each in codes} == {torch.bfloat16}
    plain = load_base(BaseSettings(str(directories["nf4"]), q_lora=True, dtype="bf16", device=CPU))
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=IDS).logits, plain.model(input_ids=IDS).logits)


def test_a_format_that_is_not_read(dense_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(dense_dir, tmp_path / "copy")
    assert "fp8" in refusal(change_config(copy, quantization_config={"quant_method": "fp8"}))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_gptq_copy_by_our_own_packing_is_served_and_trained_alike(bits: int, tmp_path: Path) -> None:
    source = write_dense(tmp_path / "source")
    copy = write_gptq_copy(source, tmp_path / "copy", group_size=32, bits=bits)
    base = load(copy)
    stream = Stream(0, IDS[0].tolist())
    step(load_served(copy, quantization="auto"), [(stream, IDS.shape[1])])
    with torch.no_grad():
        ours = base.model(input_ids=IDS[:1]).logits[0]
        whole = load(source).model(input_ids=IDS[:1]).logits[0]
    torch.testing.assert_close(ours, all_logits(stream), rtol=0, atol=1e-4)
    assert float((ours - whole).norm() / whole.norm()) < (0.5 if bits == 4 else 0.05)
    with pytest.raises(FileExistsError):
        write_gptq_copy(source, copy)
    with pytest.raises(ValueError, match="groups of 48"):
        write_gptq_copy(source, tmp_path / "other", group_size=48)


def test_texts_become_the_tokens_that_the_server_makes_of_them(dense_dir: Path) -> None:
    """transformers' AutoTokenizer gives every qwen2 Qwen's own way of splitting words, whatever its file says."""
    for directory in (DEMO / "base", dense_dir):
        ours = load_tokenizer(directory, BaseSettings(str(directory)))
        text = "<|im_start|>user\nfruit | price\nApple | 80<|im_end|>\nWhat's up?  It's 2,048."
        assert ours.encode(text) == Tokenizer(directory).encode(text)
        assert ours.padding_side == "right"
