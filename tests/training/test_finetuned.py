"""A trained model from its directory alone, in every way it can have been trained."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from manylora import training
from manylora.training.bases.load import BaseSettings, load_base
from manylora.training.bases.lora import LoraSettings, attach
from manylora.training.bases.quantized import QuantizedLinear
from manylora.training.bases.save import save_adapter
from manylora.training.errors import BaseRefused
from manylora.training.finetuned import load_finetuned_model
from tests.training.bases.making import IDS, load, write_dense, write_gptq

CPU = torch.device("cpu")


def train_a_little(model: PeftModel) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("finetuned")
    dense = write_dense(directory / "dense")
    return {"dense": dense, "nf4": dense, "gptq": write_gptq(dense, directory / "gptq", desc_act=True)}


@pytest.mark.parametrize("kind", ["dense", "nf4", "gptq"])
def test_the_model_is_as_it_was_trained(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base = load_base(BaseSettings(str(bases[kind]), q_lora=kind == "nf4", dtype="bf16", device=CPU))
    model = attach(base, LoraSettings(r=4))
    train_a_little(model)
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
    save_adapter(model, tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    loaded, tokenizer = training.load_finetuned_model(tmp_path, device="cpu")
    assert isinstance(loaded, PeftModel)
    assert not loaded.training
    assert tokenizer.chat_template == base.tokenizer.chat_template
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, expected)
    new = loaded.generate(input_ids=IDS[:1], max_new_tokens=3, do_sample=False)
    assert new.shape[1] <= IDS.shape[1] + 3
    if kind == "gptq":
        assert any(isinstance(each, QuantizedLinear) for each in loaded.modules())
        with pytest.raises(NotImplementedError, match="manylora merge"):
            loaded.merge_and_unload()


def test_bits_type_and_base_can_be_chosen(bases: dict[str, Path], tmp_path: Path) -> None:
    base = load(bases["dense"])
    save_adapter(attach(base, LoraSettings(r=4)), tmp_path)
    model, _ = load_finetuned_model(tmp_path, load_in_4bit=True, dtype=torch.bfloat16, device="cpu")
    assert model.is_loaded_in_4bit
    assert model.dtype == torch.bfloat16
    (tmp_path / "manylora_base.json").unlink()  # as in an adapter from another trainer
    moved = shutil.copytree(bases["dense"], tmp_path / "moved")
    model, _ = load_finetuned_model(tmp_path, base=str(moved), device="cpu")
    assert str(moved) in model.base_model.model.name_or_path


def test_a_base_named_from_another_working_directory(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bases["dense"].parent)
    out = tmp_path / "out"
    for staging in (out / ".adapter-partial", out / ".checkpoint-partial" / "checkpoint-3"):
        staging.mkdir(parents=True)
        save_adapter(attach(load(Path("dense")), LoraSettings(r=4)), staging)
        published = out / staging.relative_to(out / staging.relative_to(out).parts[0])
        # The file goes where adapters are published to: of this machine it tells the way between the two alone.
        held = json.loads((staging / "manylora_base.json").read_text())
        assert held["directory"] == os.path.relpath(bases["dense"].resolve(), published.resolve())
        shutil.copytree(staging, published, dirs_exist_ok=True)
        monkeypatch.chdir(tmp_path)
        load_finetuned_model(published.relative_to(tmp_path), device="cpu")
        monkeypatch.chdir(bases["dense"].parent)


def test_what_goes_with_an_adapter_names_no_place_of_the_machine(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    save_adapter(attach(load(bases["dense"]), LoraSettings(r=4)), tmp_path)
    held = json.loads((tmp_path / "manylora_base.json").read_text())
    assert held == {"kind": "dense", "double_quant": False, "dtype": "fp32"}


def test_a_model_without_adapter(bases: dict[str, Path]) -> None:
    model, tokenizer = load_finetuned_model(str(bases["dense"]), device="cpu")
    assert model.dtype == torch.bfloat16
    assert tokenizer.eos_token
    assert not isinstance(model, PeftModel)


def test_what_is_missing_is_said_in_a_line(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BaseRefused, match="no such directory"):
        load_finetuned_model(tmp_path / "nowhere")
    save_adapter(attach(load(bases["dense"]), LoraSettings(r=4)), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "manylora_base.json").unlink()
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone"}))
    with pytest.raises(BaseRefused, match="/gone: there is no such directory"):
        load_finetuned_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(BaseRefused, match="doesn't name its base"):
        load_finetuned_model(tmp_path)
    with pytest.raises(BaseRefused, match=r"torch\.float64"):
        load_finetuned_model(bases["dense"], dtype=torch.float64)


def test_the_package_has_it_without_loading_it() -> None:
    assert training.__all__ == ["load_finetuned_model"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        training.nothing  # noqa: B018
