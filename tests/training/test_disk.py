"""A disk that is full, or can't be written to: said in one line, nothing half-written, and nothing lost that was whole.

The system refuses what makes a file longer than a limit, so the errors are the libraries' own.
"""

import errno
import json
import os
import resource
import signal
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerBase
from typer.testing import CliRunner

from manylora.adapters.durable import sync
from manylora.cli import app
from manylora.demo.task_data import write_tasks
from manylora.loadtest.material.checkpoints import TINY, write_base
from manylora.training import output
from manylora.training import run as running
from manylora.training.bases.types import Base
from manylora.training.errors import InvalidArgument, TrainingError
from manylora.training.evaluate.generate import Generate
from manylora.training.loop import checkpoints
from manylora.training.loop.trainer import LoraTrainer
from manylora.training.parsing import parse_arguments
from manylora.training.run import Surroundings, train
from manylora.training.tasks import tasks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("disk")
    write_base(directory / "tiny", TINY)
    write_tasks(directory, 16, 4)
    return directory


def no_server(_: Base) -> AbstractContextManager[Generate]:
    raise AssertionError("nobody asked for answers")


def words(place: Path, out: Path) -> list[str]:
    flags = (
        f"--model_name_or_path {place / 'tiny'} --data_path {place / 'sql.json'} --output_dir {out} --use_lora"
        " --lora_r 4 --data_check off --max_steps 2 --save_steps 1 --per_device_train_batch_size 4 --live False"
    )
    return flags.split()


def run(place: Path, out: Path, *more: str) -> list[str]:
    said: list[str] = []
    train(parse_arguments([*words(place, out), *more]), Surroundings(said.append, no_server))
    return said


@contextmanager
def no_file_longer_than(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_checkpoints_that_do_not_fit_are_said_and_the_run_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever file it is that doesn't: safetensors', torch's and tokenizers' errors have nothing in common."""
    longest = {1: 30_000, 2: 100_000}
    real, write_tokenizer = LoraTrainer._save_checkpoint, PreTrainedTokenizerBase.save_pretrained

    def cut(trainer: LoraTrainer, *args: Any) -> None:
        steps.append(trainer.state.global_step)
        with no_file_longer_than(longest.get(steps[-1], 10**9)):
            real(trainer, *args)

    def save(tokenizer: Any, *args: Any, **named: Any) -> Any:
        if steps[-1] == 3:
            raise Exception("No space left on device (os error 28)")
        return write_tokenizer(tokenizer, *args, **named)

    steps: list[int] = []
    monkeypatch.setattr(LoraTrainer, "_save_checkpoint", cut)
    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", save)
    out = tmp_path / "out"
    run(place, out, "--max_steps", "4")
    assert steps == [1, 2, 3, 4]
    assert [each.name for each in checkpoints.checkpoints(out)] == ["checkpoint-4"]
    assert not (out / checkpoints.STAGING).exists()
    events = json.loads((out / "run.json").read_text())["history"]["events"]
    reasons = [each["sentence"].partition(" (")[2].partition(")")[0] for each in events]
    assert reasons == [
        "File too large",
        "it took only a part of a file, as a full one does",
        "No space left on device",
    ]


@pytest.mark.parametrize("saved", ["1", "9"])
def test_an_adapter_that_does_not_fit_is_one_line_and_is_published_once_there_is_room(
    saved: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = running.publish

    def cut(*args: Any) -> None:
        with no_file_longer_than(30_000):
            real(*args)

    monkeypatch.setattr(running, "publish", cut)
    out, flags = (
        tmp_path / "out",
        ["--save_steps", saved, "--save_strategy", "steps" if saved == "1" else "no"],
    )
    with pytest.raises(TrainingError, match=r"can't be written into .*\(File too large\)") as told:
        run(place, out, *flags)
    left = {path.name for path in out.glob("*")}
    assert "\n" not in str(told.value)
    monkeypatch.undo()
    if saved == "9":
        assert left == set()
        assert "start again" in str(told.value)
        return
    assert left == {"checkpoint-1", "checkpoint-2"}
    assert f"{out / 'checkpoint-2'} is whole" in str(told.value)
    run(place, out, *flags, "--resume")
    assert (out / "adapter_config.json").is_file()


def test_an_older_adapter_stays_whole_when_the_new_one_can_not_be_put_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(content: bytes) -> None:
        staging = output.open_adapter(tmp_path)
        (staging / output.WEIGHTS).write_bytes(content * 2048)
        (staging / output.CONFIG).write_bytes(content)
        output.publish_adapter(tmp_path)

    def full(path: Path) -> None:
        if path.name == output.CONFIG:
            raise FULL
        sync(path)

    put(b"1")
    monkeypatch.setattr(output, "sync", full)
    with pytest.raises(TrainingError, match="No space left"), output.said_of_disk(tmp_path):
        put(b"2")
    assert sorted(path.name for path in tmp_path.iterdir()) == [output.CONFIG, output.WEIGHTS]
    assert (tmp_path / output.WEIGHTS).read_bytes() == b"1" * 2048
    assert (tmp_path / output.CONFIG).read_bytes() == b"1"


def test_a_report_that_does_not_fit_does_not_cost_the_adapter(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise FULL

    monkeypatch.setattr(running, "write_report", full)
    said = run(place, tmp_path / "out", "--save_strategy", "no")
    assert any("report.html can't be written" in each and "No space left" in each for each in said)
    assert said[-2] == f"The adapter is in {tmp_path / 'out'}."
    assert said[-1].startswith("Serve it: ")


def test_a_task_whose_adapter_does_not_fit_leaves_the_others_theirs(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "tasks.yaml"
    shared = {"model_name_or_path": str(place / "tiny"), "max_steps": 2, "data_check": "off", "save_steps": 1}
    each: dict[str, dict[str, object]] = {
        name: {"data_path": str(place / f"{name}.json"), "lora_r": 4} for name in ("sql", "json")
    }
    each["sql"]["max_steps"] = 1
    plan.write_text(yaml.safe_dump({**shared, "tasks": each}))
    real = output.open_adapter

    def full(directory: Path) -> Path:
        if directory.name == "sql":
            raise FULL
        return real(directory)

    monkeypatch.setattr(output, "open_adapter", full)
    out = tmp_path / "out"
    flags = ["--tasks", str(plan), "--output_dir", str(out)]
    with pytest.raises(
        TrainingError, match=r"into .*sql \(No space left on device\); .*checkpoint-2 is whole"
    ):
        tasks.run_tasks(parse_arguments(flags))
    seen = capsys.readouterr().err.split("the tasks go on")
    assert len(seen) == 2, "said once, in the round in which it happened"
    monkeypatch.undo()
    tasks.run_tasks(parse_arguments([*flags, "--resume"]))
    assert (out / "sql" / "adapter_config.json").is_file()
    assert (out / "json" / "adapter_config.json").is_file()


@pytest.mark.parametrize("where", ["/proc/x", "/dev/null/x"])
def test_a_place_that_nobody_can_write_to_is_refused_before_any_work(where: str, place: Path) -> None:
    told = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["train", *words(place, Path(where))])
    assert told.exit_code == 2
    assert told.output.startswith(f"manylora: --output_dir {where} can't be")
    assert told.output.count("\n") == 1


@pytest.mark.parametrize("exists", [True, False])
def test_a_disk_that_takes_no_more_is_told_when_the_directory_is_claimed(
    exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**_: Any) -> Any:
        raise FULL

    directory = tmp_path if exists else tmp_path / "a" / "b"
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    with pytest.raises(InvalidArgument, match=r"can't be written to \(No space left on device\)"):
        output.claim(directory, resume=False, overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_what_the_disk_says_elsewhere_is_one_line_too(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise FULL

    monkeypatch.setattr("manylora.training.data.store.Directory", full)
    monkeypatch.setattr("manylora.training.preparation.load_data", full)
    told = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["train", *words(place, tmp_path / "out")])
    assert told.exit_code == 2, told.output
    assert told.output.splitlines()[-1].startswith("manylora: No space left on device")


def test_a_second_ctrl_c_while_the_checkpoint_of_the_first_is_written_leaves_nothing_half_written(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the last whole one is named."""
    out, real = tmp_path / "out", checkpoints.publish

    def publish(staged: Path, target: Path) -> None:
        if target.name == "checkpoint-2":
            signal.raise_signal(signal.SIGINT)
        real(staged, target)
        if target.name == "checkpoint-1":
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(checkpoints, "publish", publish)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingError, match=r"interrupted; .*checkpoint-1 is whole: .*--resume"):
        run(place, out, "--max_steps", "4")
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in out.iterdir()] == ["checkpoint-1"]
    monkeypatch.undo()
    run(place, out, "--max_steps", "4", "--resume")
    assert (out / "adapter_config.json").is_file()
