"""`manylora plan` as a user runs it."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from manylora.loadtest.material.checkpoints import BaseShape, write_base
from manylora.plan_command import plan
from manylora.training.bases.load import load_base
from manylora.training.bases.types import BaseSettings
from manylora.training.memory.plan import GIB
from tests.training.memory.test_shape import FIRST_QWEN_7B, QWEN25_7B_CONFIG

app = typer.Typer()
app.command()(plan)


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A directory with nothing but config.json."""
    (tmp_path / "config.json").write_text(json.dumps(FIRST_QWEN_7B))
    return str(tmp_path)


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(words))
    return done.exit_code, done.output


def test_it_says_every_part_and_that_it_fits(config: str) -> None:
    status, said = run(config, "--gpu", "80GiB", "--batch", "4", "--gradient-checkpointing")
    assert status == 0
    assert "It fits" in said
    for part in ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "total"):
        assert part in said


def test_of_a_small_model_no_part_is_said_to_be_nothing(tmp_path: Path) -> None:
    small = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 1070}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({**QWEN25_7B_CONFIG, **small, **heads}))
    status, said = run(str(tmp_path), "--method", "qlora", "--cpu", "16GiB")
    assert status == 0, said
    assert " M parameters in nf4" in said
    assert "< 0.01" in said
    assert " 0.00 " not in said


def test_what_does_not_fit_comes_with_flags_to_paste(config: str) -> None:
    status, said = run(
        config, "--gpu", "24GiB", "--batch", "4", "--accumulation", "8", "--gradient-checkpointing"
    )
    assert status == 0
    assert "does not fit" in said
    assert "--per_device_train_batch_size 2 --gradient_accumulation_steps 16" in said
    assert said.index("--per_device_train_batch_size") < said.index("--q_lora")
    assert "--model_max_length" not in said, "no example has to be cut"


def test_a_long_run_keeps_most_of_its_examples(tmp_path: Path) -> None:
    """All else is done before examples are cut, and they are cut least."""
    config = str(tmp_path / "qwen2.5-7b.json")
    Path(config).write_text(json.dumps(QWEN25_7B_CONFIG))
    words = ("--seq", "4096", "--batch", "4", "--gpu", "16GiB")
    answer = json.loads(run(config, *words, "--json")[1])
    (only,) = answer["remedies"]
    assert only["changes"] == ["batch", "checkpointing", "qlora", "double_quant", "seq"]
    assert only["run"]["seq"] >= 3584
    assert (
        f"--gradient_checkpointing --q_lora --double_quant --model_max_length {only['run']['seq']}"
        in run(config, *words)[1]
    )


def test_quantised_scales_are_those_that_a_base_holds(tmp_path: Path) -> None:
    directory = write_base(
        tmp_path / "base", BaseShape("qwen2", 500, 256, 704, 6, 4, 2, 512), dtype=torch.bfloat16
    )
    for flags in ([], ["--double-quant"]):
        loaded = load_base(BaseSettings(str(directory), q_lora=True, dtype="bf16", double_quant=bool(flags)))
        layers = [each for path, each in loaded.model.named_modules() if path.endswith("_proj")]
        states: list[Any] = [each.weight.quant_state for each in layers]
        scales = sum(
            each.absmax.nbytes + (each.state2.absmax.nbytes if each.nested else 0) for each in states
        )
        words = [str(directory), "--method", "qlora", *flags, "--gpu", "24GiB", "--json"]
        weights = json.loads(run(*words)[1])["parts"]["weights"] * GIB
        codes = sum(math.prod(each.shape) for each in states) / 2
        # The JSON has GiB with four digits behind the point.
        assert weights - codes == pytest.approx(scales, abs=GIB * 0.5e-4)


def test_the_kind_of_adapter_is_planned(config: str) -> None:
    """Each flag as training has it; the parts are held against tensors in tests/training/memory."""

    def parts(*words: str) -> dict[str, float]:
        found: dict[str, float] = json.loads(run(config, "--gpu", "80GiB", "--json", *words)[1])["parts"]
        return found

    plain, dora = parts(), parts("--use-dora")
    assert dora["activations"] > plain["activations"] + plain["weights"], "a copy of each matrix is kept"
    assert dora["gradients"] > plain["gradients"]
    assert parts("--use-dora", "--dropout", "0")["activations"] < dora["activations"] - plain["weights"]
    start = parts("--init-lora-weights", "pissa_niter_4")
    assert start["adapters"] - plain["adapters"] == pytest.approx(plain["gradients"], abs=1e-3), (
        "float32, frozen"
    )
    assert start["gradients"] == plain["gradients"]
    doubled = parts("--rank-pattern", "w1=128,w2=128,c_proj=128,c_attn=128")
    assert doubled["gradients"] == pytest.approx(2 * plain["gradients"], abs=1e-3)


def test_an_evaluation_and_the_served_copy_are_planned(config: str) -> None:
    def parts(*words: str) -> dict[str, float]:
        found: dict[str, float] = json.loads(run(config, "--seq", "256", "--json", *words)[1])["parts"]
        return found

    assert not {"evaluation", "served"} & set(parts("--gpu", "80GiB"))
    found = parts("--gpu", "80GiB", "--eval-seq", "2048", "--eval-batch", "16", "--answer-tokens", "512")
    assert found["evaluation"] > 10
    assert found["served"] > 5
    assert "served" in run(config, "--gpu", "80GiB", "--answer-tokens", "512")[1]


def test_json(config: str) -> None:
    _, said = run(f"{config}/config.json", "--gpu", "24GiB", "--batch", "4", "--json")
    answer = json.loads(said)
    assert answer["total_gib"] == pytest.approx(sum(answer["parts"].values()), abs=0.01)
    assert answer["fits"] is False
    assert all(each["total_gib"] <= 24 for each in answer["remedies"])
    assert answer["model"]["parameters"] == 7_721_324_544


def test_nothing_gets_it_in(config: str) -> None:
    status, said = run(config, "--gpu", "4GiB")
    assert status == 0
    assert "Take a smaller base" in said


def test_without_a_size_it_plans_for_this_machine(config: str) -> None:
    _, said = run(config, "--method", "qlora", "--seq", "64")
    assert "this machine" in said


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--seq", "0"], "--seq"),
        (["--gpu", "much"], "24GiB"),
        (["--gpu", "1GiB", "--cpu", "1GiB"], "--cpu"),
        (["--targets", "q_proj,wte"], "wte"),
        (["--recipe", "axolotl"], "qwen"),
        (["--recipe", "qwen", "--cpu", "8GiB"], "--gpu"),
        (["--optim", "lbfgs"], "lbfgs"),
        (["--eval-batch", "0"], "--eval-batch"),
        (["--answer-tokens", "-1"], "--answer-tokens"),
        (["--recipe", "qwen", "--eval-seq", "64"], "--eval-seq"),
        (["--recipe", "qwen", "--use-dora"], "--use-dora"),
        (["--double-quant"], "--method qlora"),
        (["--use-dora", "--init-lora-weights", "pissa"], "--use-dora goes with --init-lora-weights default"),
        (["--init-lora-weights", "pizza"], "pizza"),
        (["--dropout", "1"], "--dropout"),
        (["--rank-pattern", "w1"], "NAME=RANK"),
        (["--rank-pattern", "w1=0"], "w1=0"),
        (["--rank-pattern", "w3=8"], "expected some of c_attn"),
    ],
)
def test_bad_flags_end_in_one_line(config: str, words: list[str], named: str) -> None:
    status, said = run(config, *words)
    assert status == 2
    assert said.count("\n") == 1
    assert said.startswith("manylora: ")
    assert named in said


@pytest.mark.parametrize("text", ["[]", "{", '{"model_type": "bloom"}', '{"model_type": "llama"}'])
def test_a_bad_config_ends_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    status, said = run(str(tmp_path))
    assert (status, said.count("\n")) == (2, 1)


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    status, said = run(str(tmp_path / "nowhere"))
    assert (status, said.count("\n")) == (2, 1)
    assert "expected a model's directory" in said


def test_the_front_door_has_it(config: str) -> None:
    words = [sys.executable, "-m", "manylora", "plan", config, "--gpu", "24GiB", "--method", "qlora"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "It fits" in done.stdout
    assert done.stderr == ""
