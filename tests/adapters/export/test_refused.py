"""What can't be merged is refused by its name, what did not survive fails, and neither leaves anything."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from manylora.adapters.errors import AdapterError, InvalidAdapter
from manylora.adapters.export.compare import Distance, Losses, check_distance, check_losses, distance
from manylora.adapters.export.errors import ExportFailed, ExportRefused
from manylora.adapters.export.export import WRITING, WRITING_SHARE, export
from manylora.adapters.export.settings import ExportSettings
from manylora.adapters.export.write import Survival, check_survival
from manylora.loadtest.material.checkpoints import AdapterShape, write_adapter
from tests.adapters.export.making import make_base, settings

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return write_adapter(tmp_path / "adapter", base, AdapterShape(rank=4))


def refusal(kind: type[AdapterError], asked: ExportSettings) -> str:
    with pytest.raises(kind) as caught:
        export(asked)
    assert not asked.output.exists()
    assert not list(asked.output.parent.glob(".partial*"))
    message = str(caught.value)
    assert "\n" not in message
    return message


def change_config(adapter: Path, **fields: object) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | fields))


def change_tensors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"use_dora": True}, "use_dora"),
        ({"alora_invocation_tokens": [1]}, "acts from its invocation on"),
        ({"r": 8}, "has shape"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "o_proj"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_an_adapter_that_says_something_else(
    tmp_path: Path, base: Path, adapter: Path, fields: dict[str, object], says: str
) -> None:
    change_config(adapter, **fields)
    assert says in refusal(InvalidAdapter, settings(base, adapter, tmp_path / "out"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.pop(f"{Q_PROJ}.lora_B.weight"), "other half"),
        (lambda tensors: tensors.update({f"{Q_PROJ}.lora_E": torch.ones(4, 1)}), "lora_E"),
        (lambda tensors: tensors.update({"base_model.model.extra.weight": torch.ones(4)}), "extra"),
        (lambda tensors: tensors[f"{Q_PROJ}.lora_A.weight"].fill_(torch.nan), "NaN"),
        (lambda tensors: tensors.update({"base_model.model.model.norm.weight": torch.ones(4)}), "has shape"),
    ],
)
def test_tensors_that_are_not_the_adapters(
    tmp_path: Path,
    base: Path,
    adapter: Path,
    change: Callable[[dict[str, torch.Tensor]], object],
    says: str,
) -> None:
    change_tensors(adapter, change)
    assert says in refusal(InvalidAdapter, settings(base, adapter, tmp_path / "out"))


def test_a_base_that_is_not_there_or_not_one(tmp_path: Path, base: Path, adapter: Path) -> None:
    assert "config.json" in refusal(ExportRefused, settings(tmp_path / "gone", adapter, tmp_path / "out"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    save_file({"a": torch.ones(1)}, other / "model.safetensors")
    assert "gpt2" in refusal(ExportRefused, settings(other, adapter, tmp_path / "out"))
    config = json.loads((base / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config))
    assert "parameter" in refusal(ExportRefused, settings(other, adapter, tmp_path / "out"))


def test_choices_that_are_none(tmp_path: Path, base: Path, adapter: Path) -> None:
    for wrong in ({"format": "gguf"}, {"into": "8bit"}, {"dtype": "int8"}, {"shard_bytes": 0}):
        with pytest.raises(ExportRefused):
            settings(base, adapter, tmp_path / "out", **wrong)
    with pytest.raises(ExportRefused, match="base"):
        export(ExportSettings(adapter=adapter, output=tmp_path / "out"))


def test_an_output_that_exists_is_left_alone(tmp_path: Path, base: Path, adapter: Path) -> None:
    for out in (tmp_path / "directory", tmp_path / "file.zip"):
        if out.suffix:
            out.write_text("mine")
        else:
            out.mkdir()
        with pytest.raises(ExportRefused, match="exists"):
            export(settings(base, adapter, out, format="peft" if out.suffix else "merged"))
    assert (tmp_path / "file.zip").read_text() == "mine"


def test_a_disk_too_small_is_told_before_anything_is_written(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")  # what shutil returns
    monkeypatch.setattr("manylora.adapters.export.publish.shutil.disk_usage", lambda path: usage(1, 1, 1000))
    assert "GB free" in refusal(ExportRefused, settings(base, adapter, tmp_path / "out"))


def test_a_change_below_bfloat16s_steps_fails_and_float32_keeps_it(tmp_path: Path, base: Path) -> None:
    faint = write_adapter(tmp_path / "faint", base, AdapterShape(rank=4, strength=2e-4))
    asked = settings(base, faint, tmp_path / "out", into="16bit", dtype="bfloat16")
    message = refusal(ExportFailed, asked)
    assert "rounding took away" in message
    assert "--dtype float" in message
    report = export(settings(base, faint, tmp_path / "out", into="16bit", dtype="float32"))
    assert report.manifest["change_kept"] == pytest.approx(1, abs=0.01)


def test_an_adapter_that_changes_nothing_merges(tmp_path: Path, base: Path, adapter: Path) -> None:
    change_tensors(adapter, lambda tensors: [t.zero_() for name, t in tensors.items() if "lora_B" in name])
    report = export(settings(base, adapter, tmp_path / "out", into="16bit"))
    assert report.manifest["change"] == {}
    assert report.manifest["logits"]["max_abs"] == 0  # type: ignore[index]  # JSON


@pytest.mark.parametrize("form", ["merged", "merged-4bit"])
def test_what_is_not_base_and_adapter_on_the_disk_fails(
    tmp_path: Path, base: Path, adapter: Path, form: Literal["merged", "merged-4bit"]
) -> None:
    """The files are read again and computed with: here something has changed them once they were written."""

    def spoil(doing: str, share: float) -> None:
        if doing == WRITING and share == WRITING_SHARE:
            [written] = tmp_path.glob(".partial*/model.safetensors")
            tensors = load_file(written)
            tensors["model.layers.0.input_layernorm.weight"].neg_()
            save_file(tensors, written, {"format": "pt"})

    with pytest.raises(ExportFailed, match="differ from base"):
        export(settings(base, adapter, tmp_path / "out", format=form), spoil)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".partial*"))


def test_float16_overflow_is_named(tmp_path: Path, base: Path) -> None:
    loud = write_adapter(tmp_path / "loud", base, AdapterShape(rank=4, strength=1e7))
    assert "overflows torch.float16" in refusal(
        ExportFailed, settings(base, loud, tmp_path / "out", dtype="float16")
    )


def test_the_checks_themselves() -> None:
    reference = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    same = distance(reference, reference.clone())
    assert (same.max_abs, same.relative, same.top1) == (0, 0, 1)
    assert same.kl == pytest.approx(0, abs=1e-6)
    check_distance(same, 1e-4)
    for wrong in (distance(reference, reference.roll(1, 0)), Distance(1, float("nan"), 0, 1)):
        with pytest.raises(ExportFailed, match="differ from base"):
            check_distance(wrong, 0.5)
    check_losses(Losses(base=2.0, adapter=1.0, merged=1.1))
    check_losses(Losses(base=1.0, adapter=1.0, merged=1.1))
    with pytest.raises(ExportFailed, match="did not survive"):
        check_losses(Losses(base=2.0, adapter=1.0, merged=1.9))
    check_survival({}, str)
    check_survival({"a": Survival(1, 0.9, 0.1), "b": Survival(1e-4, 0.0, 1)}, str)
    with pytest.raises(ExportFailed, match=r"b keeps 10%\); take more"):
        check_survival({"a": Survival(3, 1.0, 0.1), "b": Survival(1, 0.1, 1)}, lambda: "take more")
