"""AdaLoRA spends its budget, survives a resume, and leaves a plain LoRA that computes the same, on every base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

from manylora.training.bases.settings import LoraSettings
from manylora.training.errors import InvalidArgument
from manylora.training.rank.adalora import AdaLoraRank
from manylora.training.rank.budget import AdaLoraBudget
from manylora.training.rank.make import make_policy
from tests.training.bases.making import load
from tests.training.bases.serving import served_logits
from tests.training.rank.runs import TARGETS, Run, batch, logits

BUDGET = "adalora:6:3:0.1:0.3:2"
TOTAL = 20


def adalora(text: str = BUDGET) -> AdaLoraRank:
    policy = make_policy(text, 64)
    assert isinstance(policy, AdaLoraRank)
    return policy


def start(directory: Path, kind: str = "dense", checkpoint: Path | None = None, **settings: Any) -> Run:
    base, policy = load(directory, q_lora=kind == "nf4"), adalora()
    torch.manual_seed(1)
    # A large scale, so that a few steps change what the model says.
    lora = LoraSettings(r=policy.initial_rank, alpha=960, targets=tuple(TARGETS), **settings)
    return Run.start(policy.attach(base, lora, TOTAL), policy, TOTAL, checkpoint=checkpoint)


def saved_ranks(directory: Path) -> list[int]:
    config = json.loads((directory / "adapter_config.json").read_text())
    return [config["rank_pattern"].get(path, config["r"]) for path in config["target_modules"]]


@pytest.mark.parametrize("kind", ["dense", "nf4", "gptq", "awq"])
def test_what_is_saved_is_a_plain_lora_that_computes_the_same(
    kind: str, directories: dict[str, Path], tmp_path: Path
) -> None:
    run = start(directories[kind], kind)
    run.train(until=TOTAL)
    run.policy.save(run.model, tmp_path, resumable=False)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("rank_state")]
    ranks = saved_ranks(tmp_path)
    assert sum(ranks) == 3 * 2 * len(TARGETS)
    assert len(set(ranks)) > 1
    assert max(ranks) == run.policy.rank

    base = load(directories[kind], q_lora=kind == "nf4")
    untrained = logits(base.model)
    served = served_logits(base, tmp_path, batch(10_000)[0].tolist())
    trained = logits(run.model)
    assert (trained - untrained).abs().max() > 0.1
    torch.testing.assert_close(served, trained[0], rtol=1e-4, atol=1e-4)
    plain = PeftModel.from_pretrained(base.model, tmp_path)
    torch.testing.assert_close(logits(plain), trained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("killed_at", [1, 9, 14, 16])
def test_a_killed_run_resumed_equals_the_unbroken_one(
    killed_at: int, directories: dict[str, Path], tmp_path: Path
) -> None:
    unbroken = start(directories["dense"])
    losses = unbroken.train(until=TOTAL)

    killed = start(directories["dense"])
    before = killed.train(until=killed_at)
    killed.save(tmp_path)
    resumed = start(directories["dense"], checkpoint=tmp_path)
    assert before + resumed.train(until=TOTAL) == losses
    for expected, found in zip(unbroken.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_a_step_that_was_taken_back_has_no_gradients(directories: dict[str, Path]) -> None:
    run = start(directories["dense"])
    run.train(until=12)
    run.optimizer.zero_grad()
    run.policy.after_backward(run.model, run._moment())
    run.step += 1
    run.train(until=TOTAL)
    masks = run.model.peft_config["default"].rank_pattern.values()
    assert sum(map(sum, masks)) == 3 * 2 * len(TARGETS)


def test_an_adapter_saved_before_the_first_step_changes_nothing(
    directories: dict[str, Path], tmp_path: Path
) -> None:
    run = start(directories["dense"])
    run.policy.save(run.model, tmp_path, resumable=False)
    base = load(directories["dense"])
    expected = logits(base.model)
    assert torch.equal(logits(PeftModel.from_pretrained(base.model, tmp_path)), expected)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("dense", {"modules_to_save": ("norm",)}),
        ("dense", {"new_tokens": ("<|im_start|>",)}),
        ("nf4", {"new_tokens": ("<|im_start|>",)}),
    ],
)
def test_whole_modules_and_tokens_are_saved_beside_the_factors(
    kind: str, settings: dict[str, Any], directories: dict[str, Path], tmp_path: Path
) -> None:
    run = start(directories[kind], kind, **settings)
    run.train(until=TOTAL)
    run.policy.save(run.model, tmp_path, resumable=False)
    plain = PeftModel.from_pretrained(load(directories[kind], q_lora=kind == "nf4").model, tmp_path)
    torch.testing.assert_close(logits(plain), logits(run.model), rtol=1e-5, atol=1e-5)


def test_the_penalty_is_peft_s(directories: dict[str, Path]) -> None:
    run = start(directories["dense"])
    run.train(until=3)
    run.model.eval()
    tokens = batch(0)
    with_penalty = run.model(input_ids=tokens, labels=tokens).loss
    without = run.model.get_base_model()(input_ids=tokens, labels=tokens).loss
    torch.testing.assert_close(run.policy.penalty(run.model), with_penalty - without, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"use_dora": True}, "--use_dora"),
        ({"use_rslora": True}, "--use_rslora"),
        ({"init": "pissa"}, "pissa"),
    ],
)
def test_settings_that_adalora_does_not_know_are_refused(
    settings: dict[str, Any], flag: str, directories: dict[str, Path]
) -> None:
    with pytest.raises(InvalidArgument, match=flag):
        start(directories["dense"], **settings)


def test_an_adapter_on_the_embedding_is_refused(directories: dict[str, Path]) -> None:
    lora = LoraSettings(r=6, targets=("embed_tokens",))
    with pytest.raises(InvalidArgument, match="AdaLoRA takes linear layers only"):
        adalora().attach(load(directories["dense"]), lora, TOTAL)


def test_a_run_too_short_for_the_budget_to_fall_is_refused(directories: dict[str, Path]) -> None:
    with pytest.raises(InvalidArgument, match="1 steps are too few"):
        adalora("adalora:6:3:0.2:0.7").attach(load(directories["dense"]), LoraSettings(r=6), 1)


def test_a_checkpoint_of_another_budget_is_refused(directories: dict[str, Path], tmp_path: Path) -> None:
    run = start(directories["dense"])
    run.save(tmp_path)
    with pytest.raises(InvalidArgument, match="go on with the same schedule"):
        adalora("adalora:8:3").restore(run.model, tmp_path)
    (tmp_path / "rank_state.safetensors").write_bytes(b"half")
    with pytest.raises(InvalidArgument, match="isn't a whole checkpoint"):
        run.policy.restore(run.model, tmp_path)


@given(
    st.integers(1, 256),
    st.integers(1, 256),
    st.floats(0, 0.5, exclude_max=True),
    st.floats(0, 0.5),
    st.none() | st.integers(1, 1000),
)
def test_a_budget_is_read_back_from_its_text(
    average: int, more: int, warmup: float, final: float, interval: int | None
) -> None:
    budget = AdaLoraBudget(average + more, average, warmup, final, interval)
    assert AdaLoraBudget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("adalora:", "expected adalora:FIRST_RANK"),
        ("adalora:12", "expected adalora:FIRST_RANK"),
        ("adalora:12:x", "expected adalora:FIRST_RANK"),
        ("adalora:12:8:0.1", "expected adalora:FIRST_RANK"),
        ("adalora:8:8", "below the first"),
        ("adalora:8:0", "at least 1"),
        ("adalora:12:8:0.5:0.5", "leave time between them"),
        ("adalora:12:8:nan:0.5", "leave time between them"),
        ("adalora:12:8:-0.1:0.5", "leave time between them"),
        ("adalora:12:8:0.1:0.3:0", "at least 1 step"),
    ],
)
def test_a_budget_that_means_nothing_is_refused_in_one_line(text: str, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why) as refusal:
        AdaLoraBudget.parse(text)
    assert "\n" not in str(refusal.value)
