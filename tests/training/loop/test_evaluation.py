"""An evaluation that doesn't fit into memory: in pieces, with the same result, and never a traceback."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from manylora.training.errors import DoesNotFit
from manylora.training.loop import checkpoints, evaluation
from manylora.training.loop.loss import token_losses
from tests.training.loop.making import items, make_trainer, tiny_base


def holds(rows: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have a pass over more than ``rows`` rows fail. Returns the rows of the passes that were tried."""
    tried: list[int] = []

    def limited(model: Any, inputs: Mapping[str, Tensor], *more: Any) -> Any:
        tried.append(inputs["input_ids"].shape[0])
        if tried[-1] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return token_losses(model, inputs, *more)

    monkeypatch.setattr(evaluation, "token_losses", limited)
    return tried


def options() -> dict[str, Any]:
    return {
        "eval_data": items(10, seed=5),
        "per_device_eval_batch_size": 8,
        "eval_strategy": "steps",
        "eval_steps": 3,
    }


def test_an_evaluation_out_of_memory_is_split_and_finds_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny_base(tmp_path), tmp_path / "run", items(40), **options())
    whole = trainer.evaluate()
    tried = holds(2, monkeypatch)
    parts = trainer.evaluate()
    assert parts["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-6)
    assert parts["eval_tokens"] == whole["eval_tokens"]
    assert tried == [8, 4, 2, 2, 2, 2, 2]
    assert [event.kind for event in trainer.events.all] == ["split", "split"]
    assert "evaluating 4 rows at once: going on with 2" in trainer.events.all[1].sentence
    tried.clear()
    trainer.evaluate()
    assert tried == [2, 2, 2, 2, 2]  # what didn't fit once isn't tried again


def test_a_row_that_does_not_fit_ends_the_run_with_a_checkpoint_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny_base(tmp_path), tmp_path / "run", items(40), **options())
    holds(0, monkeypatch)
    with pytest.raises(DoesNotFit, match=r"evaluating 1 rows.*goes on from step 3 with --resume"):
        trainer.train()
    assert [path.name for path in checkpoints.checkpoints(tmp_path / "run")] == ["checkpoint-3"]


def test_a_resumed_run_remembers_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    trainer = make_trainer(tiny_base(tmp_path), tmp_path / "run", items(40), **options(), **saving)
    tried = holds(4, monkeypatch)
    trainer.train()
    tried.clear()
    again = make_trainer(tiny_base(tmp_path), tmp_path / "run", items(40), **options(), **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert max(tried) == 4
