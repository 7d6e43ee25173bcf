"""A run from arguments to what it leaves and says: which step is published, who may read it, where it goes."""

import dataclasses
import json
import os
import re
import stat
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from manylora import demo
from manylora.adapters.manifest import NONE
from manylora.demo.task_data import write_tasks
from manylora.loadtest.material.checkpoints import TINY, write_base
from manylora.training import job
from manylora.training.bases.types import Base
from manylora.training.errors import TrainingError
from manylora.training.evaluate.generate import Generate
from manylora.training.loop import evaluation
from manylora.training.loop.trainer import LoraTrainer
from manylora.training.parsing import parse_arguments
from manylora.training.report.progress import LiveProgress
from manylora.training.run import Surroundings, publish, train
from tests.training.loop.hub import FakeHub

DEMO = Path(demo.__file__).parent / "base"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    write_base(directory / "tiny", TINY)
    write_tasks(directory, 24, 4)
    return directory


def no_server(_: Base) -> AbstractContextManager[Generate]:
    raise AssertionError("nobody asked for answers")


def run(place: Path, output: Path, *words: str) -> list[str]:
    """Run the command's inside. Returns what it said."""
    said: list[str] = []
    flags = (
        f"--model_name_or_path {place / 'tiny'} --data_path {place / 'sql.json'} --output_dir {output} --use_lora"
        " --lora_r 4 --data_check off --max_steps 6 --learning_rate 1e-2 --per_device_train_batch_size 4"
        f" --eval_data_path {place / 'sql-eval.json'} --live False"
    )
    train(parse_arguments([*flags.split(), *words]), Surroundings(said.append, no_server))
    return said


EVALUATED = ("--eval_strategy", "steps", "--eval_steps", "2", "--early_stopping_patience", "9")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations find these losses at steps 2, 4 and 6."""

    class Told(LoraTrainer):
        def evaluation_loop(self, *args: Any, **named: Any) -> Any:
            found = super().evaluation_loop(*args, **named)
            if self.is_in_train:
                found.metrics["eval_loss"] = (3.0, 1.5, 2.0)[self.state.global_step // 2 - 1]
            return found

    monkeypatch.setattr(job, "LoraTrainer", Told)


@pytest.mark.usefixtures("told")
def test_the_best_checkpoint_is_published_and_everything_says_which_step_it_is(
    place: Path, tmp_path: Path
) -> None:
    said = run(place, tmp_path / "out", *EVALUATED, "--save_strategy", "steps", "--save_steps", "5")
    published = load_file(tmp_path / "out" / "adapter_model.safetensors")
    best, last = (
        load_file(tmp_path / "out" / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (4, 6)
    )
    assert all(torch.equal(published[name], value) for name, value in best.items())
    assert not all(torch.equal(published[name], value) for name, value in last.items())
    sentence = "the checkpoint of step 4 of 6, the best by eval loss (1.5)"
    assert said[-2].startswith(f"The adapter is {sentence}; it is in ")
    assert said[-1].startswith("Serve it (step 4 of 6): manylora serve")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["outcome"] == f"finished; published is {sentence}"
    assert record["results"]["published_step"] == 4
    page = (tmp_path / "out" / "report.html").read_text()
    headline, curve = page.split("</header>")[0], page.split("<h2>Curves</h2>")[1]
    assert sentence in headline
    assert "published: step 4" in curve
    # The flag that did not hold is named, and stays in the report.
    overridden = next(each for each in said if "is not followed" in each)
    assert overridden.startswith(
        "--save_steps 5 is not followed: checkpoints are written when the run is evaluated"
    )
    assert "every 2 steps" in overridden
    assert overridden in page


@pytest.mark.usefixtures("told")
def test_a_run_that_keeps_no_best_publishes_its_last_step_and_says_nothing_of_a_best(
    place: Path, tmp_path: Path
) -> None:
    said = run(place, tmp_path / "out", "--save_strategy", "steps", "--save_steps", "6")
    assert said[-2].startswith("The adapter is in ")
    assert said[-1].startswith("Serve it: ")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["outcome"] == "finished", "it got better, and nothing is said of the base"
    assert record["results"]["published_step"] is None
    assert "published: step" not in (tmp_path / "out" / "report.html").read_text()
    last = (tmp_path / "out" / "checkpoint-6" / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == last


def test_a_run_that_ends_worse_than_the_base_says_so_last_and_in_its_reports_headline(
    place: Path, tmp_path: Path
) -> None:
    alone = []
    far_too_high = ("--model_name_or_path", str(DEMO), "--learning_rate", "10", "--guard", "off")
    for init in ("default", "olora"):
        out = tmp_path / init
        said = run(place, out, *far_too_high, "--init_lora_weights", init)
        assert said[-2].startswith("Serve it: ")
        sentence = "worse than the base alone: its 4 held-out rows cost "
        assert said[-1].startswith(f"The adapter is {sentence}")
        record = json.loads((out / "run.json").read_text())
        assert record["outcome"].startswith(f"finished; {sentence}")
        assert [each["kind"] for each in record["history"]["events"]][-1] == "worse"
        assert sentence in (out / "report.html").read_text().split("</header>")[0]
        alone += re.findall(r"and (\S+) without it", said[-1])
    assert len(alone) == 2
    assert alone[0] == alone[1], "the base alone is without the start that is kept beside it, too"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_what_is_published_can_be_read_by_those_whom_umask_lets(
    place: Path, tmp_path: Path, mask: int, mode: int
) -> None:
    before = os.umask(mask)
    try:
        run(place, tmp_path / "out", "--max_steps", "1", "--save_strategy", "no")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "run.json", "report.html"} <= modes.keys()
    assert {name: oct(each) for name, each in modes.items()} == dict.fromkeys(modes, oct(mode))


def test_the_hub_gets_the_published_adapter_when_it_is_whole(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub()
    monkeypatch.setattr("transformers.utils.hub._hf_api", hub)
    said = run(place, tmp_path / "out", "--max_steps", "2", "--save_strategy", "no", "--push_to_hub", "True")
    (upload,) = hub.uploads
    assert upload.folder == tmp_path / "out"
    published = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert upload.files["adapter_model.safetensors"] == published
    assert "tokenizer.json" in upload.files
    assert not {"run.json", "report.html"} & upload.files.keys()
    assert "someone/out on the Hub has it." in said
    hub.refuses = True
    with pytest.raises(TrainingError, match="ready to be uploaded by hand"):
        run(place, tmp_path / "again", "--max_steps", "1", "--save_strategy", "no", "--push_to_hub", "True")
    assert (tmp_path / "again" / "report.html").exists()


def test_held_out_rows_that_do_not_fit_do_not_cost_the_adapter(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(evaluation, "token_losses", never)
    run(place, tmp_path / "out", "--max_steps", "1", "--save_strategy", "no")
    assert (tmp_path / "out" / "adapter_config.json").exists()
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["results"]["eval_loss"] is None
    assert any("published all the same" in each["sentence"] for each in record["history"]["events"])


@dataclasses.dataclass
class Everyone:
    """A trainer whose saving is a collective."""

    saves: list[str] = dataclasses.field(default_factory=list)
    meetings: int = 0

    @property
    def accelerator(self) -> "Everyone":
        return self

    def wait_for_everyone(self) -> None:
        self.meetings += 1

    def save_model(self, output_dir: str) -> None:
        self.saves.append(output_dir)


def test_all_processes_take_part_when_the_adapter_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    trainer: Any = Everyone()
    publish(trainer, tmp_path, NONE)
    assert trainer.saves == [str(tmp_path / ".adapter-partial")]
    assert list(tmp_path.iterdir()) == []  # the first process makes it


def test_the_display_is_told_the_rank_and_the_trained_tokens(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[int | None, float | None]] = []
    real = LiveProgress.on_step_end

    def look(self: LiveProgress, *args: Any, **named: Any) -> None:
        real(self, *args, **named)
        shown.append((self.meter.rank, self.meter.trained_tokens_per_second))

    monkeypatch.setattr(LiveProgress, "on_step_end", look)
    run(place, tmp_path / "out", "--save_strategy", "no", "--rank_schedule", "2:0,4:0.5")
    assert [rank for rank, _ in shown] == [2, 2, 2, 4, 4, 4]
    assert all(rate is not None and rate > 0 for _, rate in shown[1:])
