"""A merged model is served as its config says; whoever wants it otherwise says so, and is told what it costs."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from manylora.base import load_base
from manylora.loadtest.material.checkpoints import AdapterShape, write_adapter, write_base
from manylora.merge_report import serve_adapter, serve_model
from manylora.quant.served_form import SECTION, ServedForm
from manylora.server.config import ServeSettings
from manylora.training.bases.load import load_base as load_trained
from manylora.training.bases.types import BaseSettings


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says that it is served in float16."""
    base = write_base(tmp_path_factory.mktemp("merged") / "model", dtype=torch.float16)
    config = json.loads((base / "config.json").read_text())
    form = ServedForm("float16", {"bfloat16": 0.4}, nf4_moves=0.5, adapter_moves=0.5)
    (base / "config.json").write_text(json.dumps({**config, SECTION: form.section()}))
    return base


@pytest.fixture(autouse=True)
def a_cpu_that_is_fast_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manylora.base.cpu_has_bf16", lambda: True)


def loaded(directory: Path, **settings: str) -> tuple[str, torch.dtype, tuple[str, ...]]:
    found = load_base(ServeSettings(device="cpu", **settings), directory, lambda done, total: None)
    return found.report.kind, found.dtype, found.report.notes


def test_it_is_held_as_it_says_and_what_another_way_costs_is_told(merged: Path) -> None:
    assert loaded(merged) == ("dense", torch.float32, ())
    kind, dtype, notes = loaded(merged, quantization="nf4")
    assert (kind, dtype) == ("nf4", torch.float32)
    assert "in NF4 its logits move by 0.5" in notes[0]
    _, dtype, notes = loaded(merged, dtype="bfloat16")
    assert dtype is torch.bfloat16
    assert "in bfloat16 40.0% of what was merged into it is left" in notes[0]


def test_other_models_are_held_as_before(tmp_path: Path) -> None:
    assert loaded(write_base(tmp_path / "base")) == ("nf4", torch.bfloat16, ())


def test_the_closing_line_is_held_against_what_would_be_served(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shlex.split(serve_model(merged)) == ["manylora", "serve", str(merged)]
    monkeypatch.setenv("MANYLORA_QUANTIZATION", "nf4")
    assert serve_model(merged).endswith("--quantization none")
    monkeypatch.setenv("MANYLORA_DTYPE", "bfloat16")
    assert serve_model(merged).endswith("--quantization none --dtype float32")
    odd = Path(shutil.copytree(merged, tmp_path / "a b"))
    assert shlex.split(serve_model(odd))[2] == str(odd)


@pytest.mark.parametrize(
    ("kind", "rank", "flags"), [("dense", 4, ["--quantization", "none"]), ("nf4", 300, ["--max-rank", "300"])]
)
def test_an_adapter_s_line_names_its_base_as_it_was_trained(
    tmp_path: Path, kind: str, rank: int, flags: list[str]
) -> None:
    adapter = write_adapter(tmp_path / "mine", write_base(tmp_path / "base"), AdapterShape(rank=4))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "ours/base"})
    )
    (adapter / "manylora_base.json").write_text(json.dumps({"kind": kind}))
    words = shlex.split(serve_adapter(adapter, rank))
    assert words == ["manylora", "serve", "ours/base", *flags, "--adapter", f"mine={adapter}"]


def test_training_on_a_merged_model_in_4_bits_is_told_and_served_so(merged: Path) -> None:
    settings = BaseSettings(str(merged), q_lora=True, dtype="fp32", device=torch.device("cpu"))
    base = load_trained(settings)
    assert any("in NF4 its logits move by 0.5" in note for note in base.notes)
    assert base.serve_flags == ("--quantization", "nf4")
