"""Starting from an adapter: the run's first step computes what the adapter computes, whatever its config says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from manylora.demo.task_data import write_tasks
from manylora.loadtest.material.checkpoints import TINY, write_base
from manylora.training.errors import InvalidArgument
from manylora.training.job import total_steps
from manylora.training.parsing import parse_arguments
from manylora.training.preparation import Prepared, prepare

IDS = torch.arange(3, 43)[None]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("start")
    write_tasks(directory, 12, 4)
    write_base(directory / "tiny", TINY)
    return directory


def write_adapter(place: Path, name: str, **config: Any) -> Path:
    """Write an adapter by peft, every tensor of it random."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    base = AutoModelForCausalLM.from_pretrained(place / "tiny", dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **{**options, **config}))
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(place / name)
    return place / name


def prepared(place: Path, adapter: Path, more: str = "") -> Prepared:
    arguments = parse_arguments(
        f"--model_name_or_path {place / 'tiny'} --data_path {place / 'sql.json'} --output_dir {place / 'out'}"
        f" --use_lora --data_check off --from_adapter {adapter} {more}".split()
    )
    return prepare(arguments, lambda rows: total_steps(arguments.training, rows), lambda _: None)


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def by_peft(place: Path, adapter: Path) -> Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(place / "tiny", dtype=torch.float32)
    return logits(PeftModel.from_pretrained(base, str(adapter)))


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "another-rank": {"r": 16, "lora_alpha": 64},
    "alphas": {"alpha_pattern": {"v_proj": 64, "layers.0.self_attn.q_proj": 1}},
    "ranks": {"rank_pattern": {"down_proj": 7}, "alpha_pattern": {"down_proj": 3}},
    "patterns": {"rank_pattern": {r".*\.0\..*q_proj": 2}, "alpha_pattern": {r".*\.1\..*v_proj": 32}},
    "rslora": {"use_rslora": True, "lora_alpha": 32},
    "dora": {"use_dora": True},
    "regex": {"target_modules": r".*\.(q|v)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "one-layer": {"layers_to_transform": [1]},
    "without": {"exclude_modules": ["v_proj"]},
    "biases": {"bias": "lora_only"},
    "norm": {"modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_run_starts_where_the_adapter_is(place: Path, name: str) -> None:
    adapter = write_adapter(place, name, **CONFIGS[name])
    found = prepared(place, adapter)
    torch.testing.assert_close(logits(found.model), by_peft(place, adapter), rtol=1e-4, atol=1e-4)


def test_what_is_trained_from_it_is_saved_with_its_ranks_and_alphas(place: Path, tmp_path: Path) -> None:
    config = {"rank_pattern": {"down_proj": 7}, "alpha_pattern": {"down_proj": 3, "v_proj": 64}}
    adapter = write_adapter(place, "again", **config)
    found = prepared(place, adapter)
    found.policy.save(found.model, tmp_path / "saved", resumable=False)
    torch.testing.assert_close(
        by_peft(place, tmp_path / "saved"), by_peft(place, adapter), rtol=1e-4, atol=1e-4
    )
    kept = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert {name: kept[name] for name in config} == config


def test_a_schedule_goes_on_from_the_adapters_rank(place: Path) -> None:
    adapter = write_adapter(place, "growing", r=4)
    found = prepared(place, adapter, "--rank_schedule 4:0,8:0.5 --max_steps 4")
    torch.testing.assert_close(logits(found.model), by_peft(place, adapter), rtol=1e-4, atol=1e-4)
    assert found.policy.final_rank == 8


@pytest.mark.parametrize(
    ("config", "words", "message"),
    [
        ({}, "--lora_r 8", "--lora_r 8 differs from the adapter's 4"),
        ({}, "--lora_alpha 16", "--lora_alpha 16.0 differs"),
        ({}, "--use_rslora", "--use_rslora True differs"),
        ({}, "--use_dora", "--use_dora True differs"),
        ({}, "--lora_bias all", "--lora_bias all differs"),
        ({}, "--lora_target_modules q_proj", "--lora_target_modules q_proj are others"),
        ({}, "--rank_schedule 8:0,16:0.5", "begins with rank 8"),
        ({"alpha_pattern": {"v_proj": 64}}, "--rank_schedule 4:0,8:0.5", "of its own"),
        ({}, "--rank_schedule adalora:8:4 --max_steps 100", "AdaLoRA from none"),
    ],
)
def test_what_says_otherwise_than_the_adapter_is_refused(
    place: Path, config: dict[str, Any], words: str, message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        prepared(place, write_adapter(place, "refusing", **config), words)


@pytest.mark.parametrize(
    "words", ["--lora_r 4", "--lora_alpha 8", "--lora_target_modules v_proj q_proj down_proj"]
)
def test_what_says_the_same_is_taken(place: Path, words: str) -> None:
    assert prepared(place, write_adapter(place, "same"), words).lora.r == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_lora_weights": "pissa"}, "belongs to a base that was changed"),
        ({"peft_type": "LOHA"}, "kind LOHA"),
        ({"use_qalora": True}, "use_qalora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"something_new": {"a": 1}}, "something_new"),
        ({"r": "four"}, "can't be read"),
        ({"target_modules": None}, "can't be read"),
    ],
)
def test_an_adapter_that_computes_something_else_is_refused(
    place: Path, change: dict[str, Any], message: str
) -> None:
    adapter = write_adapter(place, "odd")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InvalidArgument, match=message):
        prepared(place, adapter)
