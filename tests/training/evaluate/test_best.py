"""The best checkpoint and early stopping, where scores are often equal."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerState, TrainingArguments

from manylora.training.evaluate.best import BestCheckpoint, EarlyStopping, is_better
from tests.training.report.tiny_run import tiny_trainer


def trainer_of(
    directory: Path, scores: Sequence[float], losses: Sequence[float], patience: int = 99
) -> BestCheckpoint:
    """A trainer whose n-th evaluation, every second step, finds the n-th score and loss."""

    class Told(BestCheckpoint):
        def evaluation_loop(self, *args: Any, **named: Any) -> Any:
            output = super().evaluation_loop(*args, **named)
            turn = self.state.global_step // 2 - 1
            output.metrics.update(eval_exact_match=scores[turn], eval_loss=losses[turn])
            return output

    trainer = tiny_trainer(
        directory,
        EarlyStopping(patience),
        kind=Told,
        max_steps=2 * len(scores),
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        metric_for_best_model="eval_exact_match",
        greater_is_better=True,
        load_best_model_at_end=True,
    )
    assert isinstance(trainer, BestCheckpoint)
    return trainer


def test_among_equal_scores_the_lower_loss_is_best(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, (0, 0, 0, 0), (4, 3, 2, 2.5))
    trainer.train()
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-6")


def test_a_better_score_beats_a_lower_loss(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, (0.1, 0.3, 0.3, 0.2), (1, 3, 4, 0.5))
    trainer.train()
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-4")
    assert trainer.state.best_metric == pytest.approx(0.3)


def test_patience_ends_when_neither_score_nor_loss_gets_better(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, (0, 0, 0, 0, 0, 0.9), (4, 3, 2, 2, 3, 1), patience=2)
    trainer.train()
    assert trainer.state.global_step == 10


def test_patience_goes_on_in_a_resumed_run(tmp_path: Path) -> None:
    scores, losses = (0.5, 0.4, 0.4, 0.4, 0.4), (1, 2, 2, 2, 2)
    first = trainer_of(tmp_path, scores, losses, patience=3)
    first.train()
    assert first.state.global_step == 8
    resumed = trainer_of(tmp_path, scores, losses, patience=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.state.global_step == 8


@pytest.mark.parametrize(
    ("greater", "best", "value", "better"),
    [
        (True, 0.5, 0.6, True),
        (True, 0.5, 0.4, False),
        (False, 0.5, 0.4, True),
        (False, 0.5, 0.6, False),
        (True, 0.5, math.nan, False),
        (False, 0.5, math.nan, False),
        (True, None, 0.0, True),
        (True, 0.5, None, False),
        (True, 0.5, 0.5, False),  # no loss to compare
    ],
)
def test_scores_are_compared(
    tmp_path: Path, greater: bool, best: float | None, value: float | None, better: bool
) -> None:
    args = TrainingArguments(
        output_dir=str(tmp_path), metric_for_best_model="score", greater_is_better=greater, use_cpu=True
    )
    metrics = {} if value is None else {"eval_score": value}
    assert is_better(args, TrainerState(best_metric=best, best_global_step=2), metrics) is better
    assert not is_better(args, TrainerState(best_metric=best or 0.0, best_global_step=2), metrics, 0.2)
