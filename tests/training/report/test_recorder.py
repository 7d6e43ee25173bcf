"""What is kept of a run while it runs, over an interruption too."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from manylora.training.report.record import Event, RankChange
from manylora.training.report.recorder import RunRecorder
from tests.training.report.tiny_run import tiny_trainer


class Story(TrainerCallback):
    """Tells the recorder something at given steps."""

    def __init__(self, recorder: RunRecorder, steps: tuple[int, ...]) -> None:
        self.recorder = recorder
        self.steps = steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if state.global_step in self.steps:
            self.recorder.note("note", f"step {state.global_step} was reached")
            self.recorder.rank_changed(state.global_step, 8 * state.global_step, 100)


def test_a_run_is_recorded(tmp_path: Path) -> None:
    recorder = RunRecorder()
    recorder.rank_changed(0, 4)
    trainer = tiny_trainer(tmp_path, recorder, Story(recorder, (2, 5)))
    recorder.hear(Event(0, "note", "before the first step"))
    trainer.train()
    history = recorder.history
    assert [step for step, _ in history.series("loss")] == list(range(1, 9))
    assert [step for step, _ in history.series("eval_loss")] == [4, 8]
    assert history.events == (
        Event(0, "note", "before the first step"),
        Event(2, "note", "step 2 was reached"),
        Event(5, "note", "step 5 was reached"),
    )
    assert history.ranks == (RankChange(0, 4), RankChange(2, 16, 100), RankChange(5, 40, 100))


def test_a_resumed_run_goes_on_with_its_history(tmp_path: Path) -> None:
    first = RunRecorder()
    save: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    tiny_trainer(tmp_path, first, Story(first, (2, 5)), **save).train()
    second = RunRecorder()
    second.note("note", "resumed from step 4")
    resumed = tiny_trainer(tmp_path, second, Story(second, (7,)), **save)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    history = second.history
    assert [step for step, _ in history.series("loss")] == list(range(1, 9))
    # Step 5 was done again, by a run in which nothing happened there.
    assert {event.step for event in history.events} == {0, 2, 7}
    assert [change.step for change in history.ranks] == [2, 7]
    stored = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert any("step 7 was reached" in json.dumps(entry) for entry in stored["log_history"])


def test_the_same_rank_again_is_no_change() -> None:
    recorder = RunRecorder()
    for step, rank in ((0, 8), (3, 8), (6, 16), (9, 16), (6, 32)):
        recorder.rank_changed(step, rank)
    assert recorder.history.ranks == (RankChange(0, 8), RankChange(6, 32))


def test_a_logged_rank_is_noticed(tmp_path: Path) -> None:
    recorder = RunRecorder()
    trainer = tiny_trainer(tmp_path, recorder)
    trainer.log({"rank": 8})
    assert recorder.history.ranks == (RankChange(0, 8),)


def test_a_rank_is_kept_from_the_step_before_which_it_changed(tmp_path: Path) -> None:
    ranks = iter([4, 4, 4, 8, 8, 8, 16, 16, 16])  # at the begin, then after each of 8 steps
    recorder = RunRecorder(lambda: next(ranks))
    tiny_trainer(tmp_path, recorder).train()
    assert recorder.history.ranks == (RankChange(0, 4), RankChange(2, 8), RankChange(5, 16))
