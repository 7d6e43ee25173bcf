"""Factors named as a model's state dict names them merge like those that peft's save_pretrained wrote."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from manylora.adapters.export.export import export
from manylora.loadtest.material.checkpoints import AdapterShape, write_adapter
from tests.adapters.export.making import make_base, settings

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def test_a_state_dict_s_names_merge_to_the_same_weights(base: Path, tmp_path: Path) -> None:
    saved = write_adapter(tmp_path / "saved", base, AdapterShape(rank=4))
    state = Path(shutil.copytree(saved, tmp_path / "state"))
    tensors = {
        name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."): tensor
        for name, tensor in load_file(saved / WEIGHTS).items()
    }
    assert all(".default." in name for name in tensors)
    save_file(tensors, state / WEIGHTS)
    merged = []
    for adapter in (saved, state):
        export(settings(base, adapter, tmp_path / f"merged-{adapter.name}"))
        merged.append(load_file(tmp_path / f"merged-{adapter.name}" / "model.safetensors"))
    first, second = merged
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
