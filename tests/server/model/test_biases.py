"""Trained biases by the decoder: peft's outputs, in one batch with the base and with half of them."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from manylora.adapters.errors import InvalidAdapter
from manylora.adapters.reader import inspect_adapter
from manylora.loadtest.material.quiet import advice_off
from tests.server.model.models import save_model
from tests.server.model.steps import Stream, all_logits, load, place, step
from tests.server.model.test_dora import IDS, modules_of, read

FIELDS: dict[str, dict[str, Any]] = {
    "all": {"bias": "all", "target_modules": ["q_proj", "down_proj"]},
    "lora only": {"bias": "lora_only", "target_modules": ["q_proj", "up_proj"], "use_rslora": True},
    "of B": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 3}},
    "all and of B": {"lora_bias": True, "bias": "all", "target_modules": ["k_proj"]},
    "all, DoRA": {"bias": "all", "target_modules": ["q_proj", "gate_proj"], "use_dora": True},
}


@pytest.mark.parametrize("kind", FIELDS)
def test_logits_are_those_of_peft(kind: str, tmp_path: Path) -> None:
    theirs, model = save_model("llama-linear", tmp_path), load(tmp_path)
    torch.manual_seed(1)
    with advice_off():
        config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **FIELDS[kind])
        adapted = get_peft_model(copy.deepcopy(theirs), config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    weights = read(model, tmp_path / "adapter")
    assert weights.offsets
    [ranges] = place(model, [weights])
    streams = [Stream(0, IDS, ((ranges, 1.0),)), Stream(1, IDS), Stream(2, IDS, ((ranges, 0.5),))]
    step(model, [(stream, 40) for stream in streams])
    with torch.no_grad():
        ids = torch.tensor([IDS])
        for stream, expected in zip(streams, (adapted.eval()(ids), theirs(ids)), strict=False):
            assert float((all_logits(stream) - expected.logits[0]).abs().max()) <= 1e-4
    half, whole, base = (all_logits(streams[number])[-1] for number in (2, 0, 1))
    assert float((whole - base).abs().max()) > 0.01
    assert 0 < float((half - base).norm()) < float((whole - base).norm())
    outline = inspect_adapter(tmp_path / "adapter", modules_of(model), max_rank=8)
    assert outline.rank_by_module() == weights.rank_by_module()


def test_a_bias_too_few_or_too_many_is_refused(tmp_path: Path) -> None:
    theirs, model = save_model("qwen2", tmp_path), load(tmp_path)
    with advice_off():
        config = LoraConfig(task_type="CAUSAL_LM", r=4, bias="all", target_modules=["q_proj", "up_proj"])
        get_peft_model(theirs, config).save_pretrained(tmp_path / "all", save_embedding_layers=False)
    weights, modules = tmp_path / "all" / "adapter_model.safetensors", modules_of(model)
    whole = load_file(weights)
    assert sum(name.endswith(".bias") for name in whole) == 9, "q, k and v have one in each of three layers"
    missing = next(name for name in whole if name.endswith("k_proj.bias"))
    save_file({name: tensor for name, tensor in whole.items() if name != missing}, weights)
    with pytest.raises(InvalidAdapter, match="are missing") as caught:
        inspect_adapter(tmp_path / "all", modules, max_rank=8)
    assert caught.value.tensor == missing
    save_file(whole, weights)
    for said, about in (("none", "biases"), ("lora_only", "bias isn't all")):
        changed = json.loads((tmp_path / "all" / "adapter_config.json").read_text()) | {"bias": said}
        (tmp_path / "all" / "adapter_config.json").write_text(json.dumps(changed))
        with pytest.raises(InvalidAdapter, match=about):
            inspect_adapter(tmp_path / "all", modules, max_rank=8)
