"""Checkpoint directories: whole or not there."""

from pathlib import Path

import pytest

from manylora.training.errors import InvalidArgument
from manylora.training.loop import checkpoints


def make(output: Path, *steps: int) -> None:
    for step in steps:
        (output / f"checkpoint-{step}").mkdir(parents=True)


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    make(tmp_path, 100, 20, 3)
    (tmp_path / "checkpoint-final").mkdir()
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == [
        "checkpoint-3",
        "checkpoint-20",
        "checkpoint-100",
    ]
    assert checkpoints.last_checkpoint(tmp_path).name == "checkpoint-100"


def test_what_is_half_written_is_no_checkpoint(tmp_path: Path) -> None:
    staging = checkpoints.open_staging(tmp_path)
    (staging / "checkpoint-5").mkdir()
    (staging / "checkpoint-5" / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(InvalidArgument, match="no checkpoint"):
        checkpoints.last_checkpoint(tmp_path)
    assert not list(checkpoints.open_staging(tmp_path).iterdir())


def test_publishing_takes_the_place_of_an_older_one_whole(tmp_path: Path) -> None:
    make(tmp_path, 5)
    (tmp_path / "checkpoint-5" / "old").touch()
    staged = checkpoints.open_staging(tmp_path) / "checkpoint-5"
    staged.mkdir()
    (staged / "new").touch()
    checkpoints.publish(staged, tmp_path / "checkpoint-5")
    assert [path.name for path in (tmp_path / "checkpoint-5").iterdir()] == ["new"]
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["checkpoint-5"]


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(None, None, [1, 2, 3, 4]), (2, None, [3, 4]), (2, 1, [1, 4]), (1, 2, [2, 4]), (9, None, [1, 2, 3, 4])],
)
def test_rotation_keeps_the_newest_and_the_best(
    tmp_path: Path, keep: int | None, best: int | None, left: list[int]
) -> None:
    make(tmp_path, 1, 2, 3, 4)
    checkpoints.rotate(tmp_path, keep, [] if best is None else [tmp_path / f"checkpoint-{best}"])
    assert [checkpoints.step_of(path) for path in checkpoints.checkpoints(tmp_path)] == left


def test_another_programs_checkpoint_is_refused(tmp_path: Path) -> None:
    make(tmp_path, 1)
    with pytest.raises(InvalidArgument, match="--from_adapter"):
        checkpoints.read_state(tmp_path / "checkpoint-1")
