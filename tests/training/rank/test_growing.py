"""Growing the rank changes no output, keeps the optimiser, survives a resume, and leaves an ordinary adapter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau

from manylora.training.bases.lora import LoraSettings, attach
from manylora.training.errors import InvalidArgument
from manylora.training.rank.growing import GrowingRank
from manylora.training.rank.make import make_policy
from manylora.training.rank.schedule import RankSchedule
from tests.training.bases.making import load
from tests.training.bases.serving import served_logits
from tests.training.rank.runs import TARGETS, Run, batch, logits, small_adapter, small_base

SCHEDULE = "2:0,4:0.3,13:0.6"
TOTAL = 20
VARIANTS: dict[str, dict[str, bool]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}


def growing(schedule: str = SCHEDULE) -> GrowingRank:
    policy = make_policy(schedule, 64)
    assert isinstance(policy, GrowingRank)
    return policy


def run_of(variant: str = "lora", checkpoint: Path | None = None) -> Run:
    return Run.start(small_adapter(2, **VARIANTS[variant]), growing(), TOTAL, checkpoint=checkpoint)


@pytest.mark.parametrize("variant", VARIANTS)
def test_growing_changes_no_logit(variant: str) -> None:
    run = run_of(variant)
    for border, rank in ((6, 4), (12, 13)):
        run.train(until=border)
        before = logits(run.model)
        assert run.policy.before_step(run.model, run._moment())
        assert run.model.peft_config["default"].r == rank
        assert torch.equal(logits(run.model), before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_saved_is_an_ordinary_adapter(variant: str, tmp_path: Path) -> None:
    run = run_of(variant)
    run.train(until=TOTAL)
    run.policy.save(run.model, tmp_path, resumable=False)
    assert not (tmp_path / "rank_state.json").exists()
    names = [
        name.removeprefix("base_model.model.model.")
        for name in load_file(tmp_path / "adapter_model.safetensors")
    ]
    assert not [name for name in names if "default" in name or "slice" in name]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (13, {})
    assert config["lora_alpha"] == pytest.approx(16 * 6.5 if variant != "rslora" else 16 * 6.5**0.5)
    plain = PeftModel.from_pretrained(small_base(), tmp_path)
    torch.testing.assert_close(logits(plain), logits(run.model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("nf4", {}), ("gptq", {}), ("awq", {"use_rslora": True}), ("nf4", {"init": "pissa"})],
)
def test_a_grown_adapter_is_served_as_it_was_trained(
    kind: str, settings: dict[str, Any], directories: dict[str, Path], tmp_path: Path
) -> None:
    base = load(directories[kind], q_lora=kind == "nf4")
    lora = LoraSettings(r=2, targets=tuple(TARGETS), dropout=0.0, **settings)
    run = Run.start(attach(base, lora), growing(), TOTAL)
    run.train(until=12)
    before = logits(run.model)
    run.train(until=13)  # grows to 13 and takes one step
    assert not torch.equal(logits(run.model), before)
    run.save(tmp_path)
    expected = logits(run.model)
    served = served_logits(base, tmp_path, batch(10_000)[0].tolist())
    torch.testing.assert_close(served, expected[0], rtol=1e-4, atol=1e-4)

    torch.manual_seed(3)
    again = load(directories[kind], q_lora=kind == "nf4")
    resumed = Run.start(attach(again, lora), growing(), TOTAL, checkpoint=tmp_path)
    assert resumed.train(until=TOTAL) == run.train(until=TOTAL)


@pytest.mark.parametrize("killed_at", [5, 6, 7, 13])
def test_a_killed_run_resumed_equals_the_unbroken_one(killed_at: int, tmp_path: Path) -> None:
    unbroken = run_of()
    losses = unbroken.train(until=TOTAL)

    killed = run_of()
    before = killed.train(until=killed_at)
    killed.save(tmp_path)
    resumed = run_of(checkpoint=tmp_path)
    assert resumed.step == killed_at
    assert before + resumed.train(until=TOTAL) == losses
    for expected, found in zip(unbroken.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(expected, found)
    assert unbroken.scheduler.get_last_lr() == resumed.scheduler.get_last_lr()


def test_a_run_that_grew_beyond_a_checkpoint_goes_back_to_it(tmp_path: Path) -> None:
    run = run_of()
    run.train(until=7)
    run.save(tmp_path)
    expected = logits(run.model)
    run.train(until=14)
    run.policy.restore(run.model, tmp_path)
    assert torch.equal(logits(run.model), expected)
    assert run.model.peft_config["default"].r == 4


def test_old_parameters_keep_their_optimiser_state_and_new_ones_take_their_groups_settings() -> None:
    run = run_of()
    run.train(until=6)
    old = [group["params"] for group in run.optimizer.param_groups]
    counts = [run.optimizer.state[p]["step"].item() for group in old for p in group]
    moments = [run.optimizer.state[p]["exp_avg"].clone() for group in old for p in group]
    run.policy.before_step(run.model, run._moment())
    assert [group["params"] for group in run.optimizer.param_groups[:2]] == old
    assert (
        counts
        == [run.optimizer.state[p]["step"].item() for group in old for p in group]
        == [6.0] * len(counts)
    )
    assert all(
        torch.equal(m, run.optimizer.state[p]["exp_avg"])
        for m, p in zip(moments, (p for group in old for p in group), strict=True)
    )
    a, b = run.optimizer.param_groups[2:]
    assert (a["weight_decay"], a["initial_lr"]) == (0.01, 1e-3)
    assert (b["weight_decay"], b["initial_lr"]) == (0.1, 4e-3)
    assert {p.shape[0] for p in a["params"]} == {2}
    assert {p.shape[1] for p in b["params"]} == {2}
    trained = {id(p) for p in run.model.parameters() if p.requires_grad}
    assert trained == {id(p) for group in run.optimizer.param_groups for p in group["params"]}


def test_new_slices_warm_up_to_the_rate_of_the_old_ones() -> None:
    policy = GrowingRank(RankSchedule.parse(SCHEDULE), seed=0, warmup_share=0.2)
    run = Run.start(small_adapter(2), policy, TOTAL)
    run.train(until=6)
    policy.before_step(run.model, run._moment())
    shares = []
    while run.step < 11:
        groups = run.optimizer.param_groups
        assert groups[2]["lr"] / groups[0]["lr"] == pytest.approx(groups[3]["lr"] / groups[1]["lr"])
        shares.append(groups[2]["lr"] / groups[0]["lr"])
        run.train(until=run.step + 1)
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_a_scheduler_that_looks_at_the_loss_is_refused_at_once() -> None:
    policy = growing()
    model = small_adapter(2)
    policy.prepare(model)
    scheduler = ReduceLROnPlateau(SGD(model.parameters(), lr=1.0))
    with pytest.raises(InvalidArgument, match="ReduceLROnPlateau"):
        policy.scheduler(scheduler)


def test_an_adapter_of_another_rank_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="begins with rank 2, but the adapter has rank 3"):
        growing().prepare(small_adapter(3))


def test_an_adapter_on_the_embedding_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="embed_tokens"):
        growing().prepare(small_adapter(2, target_modules=["embed_tokens", "q_proj"]))


def test_a_checkpoint_of_another_schedule_is_refused(tmp_path: Path) -> None:
    run = run_of()
    run.save(tmp_path)
    other = growing("2:0,8:0.5")
    model = small_adapter(2)
    other.prepare(model)
    with pytest.raises(InvalidArgument, match=r"2:0,4:0\.3,13:0\.6, this run has 2:0,8:0\.5"):
        other.restore(model, tmp_path)
    with pytest.raises(InvalidArgument, match="isn't a checkpoint of a run with --rank_schedule"):
        other.restore(model, tmp_path / "elsewhere")


def test_new_slices_do_not_jump_at_the_next_step() -> None:
    """With the count of a long run and no moments, Adam's first update of a new B is 3 × the learning rate."""
    updates = {}
    for name in ("ours", "one count for old and new"):
        policy = GrowingRank(RankSchedule.parse("2:0,4:0.9"), seed=0, warmup_share=0.0)
        run = Run.start(small_adapter(2), policy, 20)
        run.train(until=18)
        policy.before_step(run.model, run._moment())
        new = run.optimizer.param_groups[3]
        if name != "ours":
            for part in new["params"]:
                zeros = {key: torch.zeros_like(part) for key in ("exp_avg", "exp_avg_sq")}
                run.optimizer.state[part] = {"step": torch.tensor(5000.0), **zeros}
        rate = new["lr"]
        run.train(until=19)
        updates[name] = max(part.detach().abs().max().item() / rate for part in new["params"])
    assert updates["ours"] == pytest.approx(1.0, abs=0.01)
    assert updates["one count for old and new"] == pytest.approx(0.1 / 0.001**0.5, abs=0.1)
