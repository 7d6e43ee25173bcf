"""The output directory: nothing is overwritten, and an adapter is there whole or not at all."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from manylora.training import output
from manylora.training.errors import InvalidArgument, TrainingError


def test_an_empty_or_new_directory_can_be_claimed(tmp_path: Path) -> None:
    output.claim(tmp_path / "a" / "b", resume=False, overwrite=False)
    assert not (tmp_path / "a").exists()
    output.open_output(tmp_path / "a" / "b", overwrite=False)
    assert not list((tmp_path / "a" / "b").iterdir())


@pytest.mark.parametrize("name", ["adapter_config.json", "checkpoint-3/x"])
def test_an_older_run_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(InvalidArgument, match="--resume"):
        output.claim(tmp_path, resume=False, overwrite=False)
    assert (tmp_path / name).read_text() == "{}"
    output.claim(tmp_path, resume=False, overwrite=True)
    output.clear(tmp_path)
    assert not (tmp_path / name).exists()


def test_one_run_at_a_time_is_at_work_in_a_directory(tmp_path: Path) -> None:
    run = tmp_path / "new" / "run"
    with output.alone(run), output.alone(tmp_path / "new" / "other"):
        output.claim(run, resume=False, overwrite=False)
        with pytest.raises(InvalidArgument, match="another run is at work there"), output.alone(run):
            pass
    assert not (tmp_path / "new").exists()
    with output.alone(run):
        (run / "file").touch()
    with output.alone(run):
        assert (run / "file").exists()


def test_a_run_that_goes_on_elsewhere_takes_no_older_runs_place(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for directory in (here, there):
        make_checkpoint(directory / "checkpoint-3")
    point = there / "checkpoint-3"
    with pytest.raises(InvalidArgument, match=r"here holds checkpoints of a run.*--overwrite_output_dir"):
        output.claim(here, resume=True, overwrite=False, checkpoint=point)
    output.claim(here, resume=True, overwrite=True, checkpoint=point)
    output.claim(there, resume=True, overwrite=False, checkpoint=point)
    output.claim(tmp_path / "new", resume=True, overwrite=False, checkpoint=point)


def make_checkpoint(directory: Path) -> None:
    """Write what is looked at of one that is whole."""
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text("{}")
    (directory / "trainer_state.json").write_text('{"global_step": 3, "max_steps": 6, "log_history": []}')
    (directory / "manylora_state.json").write_text('{"micro_rows": null}')
    save_file({"x": torch.zeros(1)}, directory / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({}, directory / name)


def test_a_file_in_its_place_and_nothing_to_resume_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgument, match="is a file"):
        output.claim(tmp_path / "file", resume=False, overwrite=False)
    with pytest.raises(InvalidArgument, match=f"can't be made: {tmp_path / 'file'} is a file"):
        output.claim(tmp_path / "file" / "out", resume=False, overwrite=False)
    with pytest.raises(InvalidArgument, match="no checkpoint"):
        output.claim(tmp_path / "new", resume=True, overwrite=False)


def test_an_adapter_is_published_whole(tmp_path: Path) -> None:
    staging = output.open_adapter(tmp_path)
    (staging / "adapter_model.safetensors").write_bytes(bytes(2048))
    with pytest.raises(TrainingError, match="no adapter"):
        output.publish_adapter(tmp_path)
    (staging / "adapter_config.json").write_text("{}")
    output.publish_adapter(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_kill_in_the_midst_of_publishing_leaves_no_adapter_rather_than_half_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = output.open_adapter(tmp_path)
    (staging / "adapter_model.safetensors").write_bytes(bytes(2048))
    for name in ("adapter_config.json", "tokenizer.json"):
        (staging / name).write_text("{}")
    real = Path.replace

    def killed(path: Path, target: Path) -> Path:
        if path.name == "tokenizer.json":
            raise KeyboardInterrupt
        return real(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        output.publish_adapter(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()


def test_an_empty_adapter_is_not_published(tmp_path: Path) -> None:
    staging = output.open_adapter(tmp_path)
    (staging / "adapter_model.safetensors").write_bytes(b"{}")
    (staging / "adapter_config.json").write_text("{}")
    with pytest.raises(TrainingError, match="no adapter"):
        output.publish_adapter(tmp_path)
