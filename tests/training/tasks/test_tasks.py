"""`--tasks` from file to adapters: what is on the disk afterwards, what server and peft make of it, and resuming."""

import json
import os
import shlex
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

from manylora import demo
from manylora.demo.task_data import write_tasks
from manylora.loadtest.material.checkpoints import TINY, write_base
from manylora.training.errors import Diverged, InvalidArgument, TrainingError
from manylora.training.loop import checkpoints
from manylora.training.output import alone
from manylora.training.parsing import parse_arguments
from manylora.training.tasks import tasks
from manylora.training.tasks.display import TasksDisplay
from manylora.training.tasks.member import Member
from manylora.training.tasks.side_by_side import SideBySide
from manylora.training.tasks.tasks import TaskResult, run_tasks
from tests.training.bases.serving import read_for
from tests.training.loop.making import tiny_base

DEMO = Path(demo.__file__).parent / "base"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def write_plan(directory: Path, **shared: object) -> Path:
    write_base(directory / "base", TINY)
    write_tasks(directory / "data", rows=24, eval_rows=4)
    data = directory / "data"
    content: dict[str, object] = {
        "model_name_or_path": str(directory / "base"),
        "output_dir": str(directory / "out"),
        "model_max_length": 256,
        "data_check": "off",
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "lora_dropout": 0.1,
        "save_steps": 2,
        **shared,
        "tasks": {
            "sql": {
                "data_path": str(data / "sql.json"),
                "eval_data_path": str(data / "sql-eval.json"),
                "lora_r": 4,
                "lora_target_modules": ["q_proj", "v_proj"],
            },
            "json": {"data_path": str(data / "json.json"), "rank_schedule": "2:0,4:0.5", "max_steps": 3},
            "team/pirate": {"data_path": str(data / "pirate.json"), "lora_r": 8, "eval_share": 0.2},
        },
    }
    path = directory / "tasks.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def run(plan: Path, *words: str) -> list[TaskResult]:
    """Run the tasks; the output directory is the plan's."""
    return run_tasks(
        parse_arguments(["--tasks", str(plan), "--output_dir", str(plan.parent / "out"), *words])
    )


def test_every_task_leaves_an_adapter_that_the_server_takes_and_one_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run(write_plan(tmp_path), "--save_strategy", "no")
    [line] = [line for line in capsys.readouterr().err.splitlines() if "Serve them: " in line]
    words = shlex.split(line.partition("Serve them: ")[2])
    assert words[:5] == ["manylora", "serve", str(tmp_path / "base"), "--quantization", "none"]
    served = [word.partition("=")[0] for word in words if "=" in word]
    assert served == ["sql", "json", "team/pirate"]
    out = tmp_path / "out"
    assert [(each.name, each.steps) for each in results] == [("sql", 4), ("json", 3), ("team/pirate", 4)]
    assert results[0].eval_loss is not None
    assert results[1].eval_loss is None
    base = tiny_base(tmp_path)
    ranks = {name: read_for(base, out / name).spec.rank for name in ("sql", "json", "team/pirate")}
    assert ranks == {"sql": 4, "json": 4, "team/pirate": 8}
    config = json.loads((out / "json" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    record = json.loads((out / "sql" / "run.json").read_text())
    assert record["results"]["steps"] == 4
    assert record["outcome"].startswith("finished")
    page = (out / "report.html").read_text()
    assert all(name in page for name in ranks)


def test_peft_computes_with_an_adapter_what_was_trained(tmp_path: Path) -> None:
    from peft import PeftModel

    results = run(write_plan(tmp_path, learning_rate=1e-2), "--save_strategy", "no")
    assert results[0].adapter is not None
    model = PeftModel.from_pretrained(tiny_base(tmp_path).model, str(results[0].adapter)).eval()
    from manylora.training.data.dataset import DataSettings, load_data
    from manylora.training.loop.loss import trained_token_loss

    data = load_data(
        DataSettings((str(tmp_path / "data" / "sql-eval.json"),), 256), tiny_base(tmp_path).tokenizer
    )
    total, count = 0.0, 0
    for at in range(len(data.dataset)):
        row = {key: torch.tensor([data.dataset[at][key]]) for key in ("input_ids", "labels")}
        loss, trained = trained_token_loss(model, row)
        total, count = total + float(loss), count + trained
    assert total / count == pytest.approx(results[0].eval_loss, rel=1e-4)


def test_a_run_that_was_killed_goes_on_to_the_same_adapters(tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    run(plan)
    whole = weights_of_tasks(tmp_path / "out")
    for path in checkpoints.checkpoints(tmp_path / "out")[1:]:
        shutil.rmtree(path)
    for name in ("sql", "json", "team"):
        shutil.rmtree(tmp_path / "out" / name)
    run(plan, "--resume", "True")
    assert weights_of_tasks(tmp_path / "out") == whole


def test_other_settings_of_a_task_are_refused_with_their_names(tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    run(plan)
    content = yaml.safe_load(plan.read_text())
    content["tasks"]["sql"]["lora_alpha"] = 64
    content["tasks"]["json"]["data_path"] = str(tmp_path / "data" / "sql.json")
    plan.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(
        InvalidArgument, match=r"checkpoint-4/sql is of .*--lora_alpha is 64.0 now and was 16"
    ):
        run(plan, "--resume")
    content["tasks"]["sql"].pop("lora_alpha")
    plan.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(InvalidArgument, match=r"checkpoint-4/json is of .*--data_path holds other data"):
        run(plan, "--resume")


@pytest.mark.parametrize("name", ["task.pt", "trainer_state.json", "adapter_model.safetensors"])
def test_a_tasks_file_that_is_cut_or_missing_is_named(tmp_path: Path, name: str) -> None:
    plan = write_plan(tmp_path)
    run(plan)
    path = tmp_path / "out" / "checkpoint-4" / "team" / "pirate" / name
    path.write_bytes(path.read_bytes()[:100])
    older = "remove it to go on from the one before it"
    with pytest.raises(InvalidArgument, match=f"{name} is cut or broken; {older}"):
        run(plan, "--resume")
    path.unlink()
    with pytest.raises(InvalidArgument, match=f"has no team/pirate/{name}; {older}"):
        run(plan, "--resume")


@pytest.mark.parametrize("name", ["team/pirate/task.pt", "random.pt"])
def test_states_of_something_else_are_named(tmp_path: Path, name: str) -> None:
    plan = write_plan(tmp_path)
    run(plan)
    kept = checkpoints.checkpoints(tmp_path / "out")
    for each in kept[:-1]:
        shutil.rmtree(each)
    torch.save({}, kept[-1] / name)
    with pytest.raises(InvalidArgument, match=rf"{name} of .* can't be read .*the only one: start again"):
        run(plan, "--resume")
    (kept[-1] / "manylora_state.json").write_text("[]")
    with pytest.raises(InvalidArgument, match=r"is no checkpoint of manylora .*the only one: start again"):
        run(plan, "--resume")


def weights_of_tasks(out: Path) -> dict[str, bytes]:
    names = ("sql", "json", "team/pirate")
    return {name: (out / name / "adapter_model.safetensors").read_bytes() for name in names}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_interrupted_writes_a_checkpoint_and_goes_on_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    plan = write_plan(tmp_path, save_strategy="no")
    run(plan)
    whole = weights_of_tasks(tmp_path / "out")
    real = TasksDisplay.round_done
    before = signal.getsignal(number)

    def interrupt(display: TasksDisplay, rounds: SideBySide) -> None:
        real(display, rounds)
        if rounds.rounds == 1:
            signal.raise_signal(number)

    monkeypatch.setattr(TasksDisplay, "round_done", interrupt)
    with pytest.raises(
        TrainingError, match=r"checkpoint-2 is whole: go on with the same command and --resume"
    ):
        run(plan, "--overwrite_output_dir", "True")
    monkeypatch.undo()
    assert signal.getsignal(number) is before
    assert not (tmp_path / "out" / "sql" / "adapter_config.json").exists()
    run(plan, "--resume", "True")
    assert weights_of_tasks(tmp_path / "out") == whole


def test_an_interruption_after_the_last_step_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = write_plan(tmp_path, save_strategy="no")
    real = SideBySide.evaluate

    def interrupt(rounds: SideBySide, members: Sequence[Member]) -> None:
        if all(member.finished for member in rounds.members):
            signal.raise_signal(signal.SIGTERM)
        real(rounds, members)

    monkeypatch.setattr(SideBySide, "evaluate", interrupt)
    assert all(result.adapter is not None for result in run(plan))


def test_nothing_is_overwritten_unless_that_is_asked_for(tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    (tmp_path / "out" / "json").mkdir(parents=True)
    (tmp_path / "out" / "json" / "adapter_config.json").write_text("{}")
    with pytest.raises(InvalidArgument, match="out/json holds an adapter"):
        run(plan)
    with pytest.raises(InvalidArgument, match="has no checkpoint"):
        run(plan, "--resume", "True")
    assert sorted(os.listdir(tmp_path / "out")) == ["json"]
    run(plan, "--overwrite_output_dir", "True", "--save_strategy", "no")
    assert json.loads((tmp_path / "out" / "json" / "adapter_config.json").read_text())["r"] == 4


def test_a_directory_that_a_run_is_at_work_in_is_left_to_it(tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    with alone(tmp_path / "out"), pytest.raises(InvalidArgument, match="another run is at work there"):
        run(plan)
    assert not (tmp_path / "out").exists()


def test_other_tasks_are_no_run_to_go_on_with(tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    run(plan)
    content = yaml.safe_load(plan.read_text())
    content["tasks"]["another"] = content["tasks"].pop("json")
    plan.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(InvalidArgument, match="of the tasks"):
        run(plan, "--resume", "True")


def test_a_task_that_diverges_leaves_no_adapter_and_is_told_after_the_others_are_done(tmp_path: Path) -> None:
    plan = write_plan(tmp_path, on_divergence="stop", save_strategy="no")
    content = yaml.safe_load(plan.read_text())
    content["tasks"]["json"] |= {"learning_rate": 1e30, "max_grad_norm": 0.0}
    plan.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(Diverged, match=r"json stopped at step \d.*done: .*sql"):
        run(plan)
    assert not (tmp_path / "out" / "json" / "adapter_config.json").exists()
    assert (tmp_path / "out" / "sql" / "adapter_config.json").exists()


def test_a_task_that_ends_worse_than_the_base_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = write_plan(tmp_path, guard="off", save_strategy="no")
    content = yaml.safe_load(plan.read_text()) | {"model_name_or_path": str(DEMO)}
    for name in ("sql", "json"):
        content["tasks"][name] |= {"learning_rate": 10.0, "max_steps": 3}
    content["tasks"]["json"]["init_lora_weights"] = "olora"
    del content["tasks"]["json"]["rank_schedule"]
    plan.write_text(yaml.safe_dump(content, sort_keys=False))
    results = {each.name: each.worse for each in run(plan)}
    assert results["sql"].startswith("worse than the base alone: its 4 held-out rows cost ")
    assert results["json"].startswith("worse than the base alone: its 8 last rows cost ")
    assert not results["team/pirate"]
    said = capsys.readouterr().err
    assert said.index("sql: adapter in ") < said.index(f"sql: the adapter is {results['sql']}.")
    records = {name: json.loads((tmp_path / "out" / name / "run.json").read_text()) for name in results}
    for name, worse in results.items():
        outcome = records[name]["outcome"]
        assert outcome.endswith(f"; {worse}") if worse else outcome.endswith("other tasks")
    assert results["sql"] in (tmp_path / "out" / "report.html").read_text()


def test_finished_adapters_are_registered_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sequence[object]] = []
    before: list[Sequence[object]] = []

    def can_register(url: str, name: str, admin_key: str | None) -> str:
        before.append((url, name, admin_key))
        return "would be served"

    def register(url: str, name: str, directory: Path, admin_key: str | None) -> str:
        asked.append((url, name, directory.name, admin_key))
        return "served"

    monkeypatch.setattr(tasks, "can_register", can_register)
    monkeypatch.setattr(tasks, "register", register)
    plan = write_plan(tmp_path, save_strategy="no", max_steps=1)
    run(plan, "--register", "http://server", "--admin_key", "secret")
    assert asked == [
        ("http://server", "sql", "sql", "secret"),
        ("http://server", "json", "json", "secret"),
        ("http://server", "team/pirate", "pirate", "secret"),
    ]
    assert before == [(url, name, key) for url, name, _, key in asked]


def test_a_tracker_gets_one_run_with_each_task_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    plan = write_plan(tmp_path, save_strategy="no", max_steps=2)
    run(plan, "--report_to", "tensorboard")
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert {
        "train/sql/loss",
        "eval/sql/loss",
        "train/team/pirate/learning_rate",
        "train/json/grad_norm",
    } <= names
    assert [each.step for each in events.Scalars("train/sql/loss")] == [1, 2]
