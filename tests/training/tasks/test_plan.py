"""tasks.yaml: whose keys win, and what is refused, naming file, task and key."""

from pathlib import Path

import pytest

from manylora.training.errors import InvalidArgument
from manylora.training.parsing import parse_arguments
from manylora.training.tasks.plan import Plan, read_tasks

GOOD = """
model_name_or_path: base
q_lora: true
output_dir: out
lora_r: 16
learning_rate: 3e-4
tasks:
  sql: {data_path: sql.jsonl, lora_r: 8, num_train_epochs: 3}
  team/json:
    data_path: [a.jsonl, "b.jsonl:0.5"]
    warmup_ratio: 0.1
"""


def read(directory: Path, content: str, *words: str) -> Plan:
    path = directory / "tasks.yaml"
    path.write_text(content)
    return read_tasks(parse_arguments(["--tasks", str(path), "--output_dir", "unused", *words]))


def test_own_keys_win_over_flags_and_flags_over_shared_keys(tmp_path: Path) -> None:
    plan = read(tmp_path, GOOD, "--lora_r", "32", "--output_dir", "elsewhere")
    sql, json = plan.tasks
    assert (sql.name, json.name) == ("sql", "team/json")
    assert (sql.arguments.lora.lora_r, json.arguments.lora.lora_r) == (8, 32)
    assert sql.training.learning_rate == json.training.learning_rate == 3e-4
    assert (sql.training.num_train_epochs, json.training.num_train_epochs) == (3, 3.0)
    assert json.arguments.data.data_path == ["a.jsonl", "b.jsonl:0.5"]
    assert json.training.warmup_steps == 0.1
    assert sql.directory == Path("elsewhere/sql")
    assert json.directory == Path("elsewhere/team/json")
    assert plan.arguments.lora.q_lora
    assert "--tasks" not in sql.arguments.command
    assert parse_arguments(sql.arguments.command).lora == sql.arguments.lora
    assert sql.arguments.model.model_name_or_path == "base"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("sql: {data_path: a, lora_rank: 8}", "task sql: lora_rank is no key of a task; did you mean lora_"),
        ("sql: {data_path: a, q_lora: true}", "task sql: q_lora is the same for all tasks"),
        ("sql: {lora_r: 8}", "task sql: --data_path is missing"),
        ("sql: {data_path: a}\n  sql: {data_path: b}", "'sql' is given twice"),
        ("sql: {data_path: a, data_path: b}", "'data_path' is given twice"),
        ("'s q l': {data_path: a}", "only letters, digits"),
        ("../sql: {data_path: a}", "no part between slashes"),
        ("report.html: {data_path: a}", "the run writes report.html into its directory itself"),
        ("checkpoint-5/sql: {data_path: a}", "the run writes checkpoint-5 into its directory itself"),
        ("sql: {data_path: a, lora_r: 0}", "task sql: .*lora_r 0"),
        ("sql: {data_path: a, lora_r: many}", "task sql: .*lora_r"),
        ("sql: {data_path: }", "data_path has no value"),
        ("sql: [a]", "task sql: expected keys and values"),
        ("sql: {data_path: a, learning_rate: auto}", "learning_rate auto doesn't go with --tasks"),
        ("sql: {data_path: a, rank_schedule: 'adalora:12:4'}", "doesn't go with --tasks"),
        ("sql: {data_path: a, eval_strategy: steps}", "task sql: evaluation needs data"),
        ("sql: {data_path: a}\n  sql/x: {data_path: b}", "within another task's directory"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, keys: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        read(tmp_path, f"q_lora: true\ntasks:\n  {keys}\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lora_r: 8", "`tasks` is missing"),
        ("tasks: {}", "`tasks` is missing"),
        ("- a", "expected keys and values"),
        ("tasks: {sql: [", "can't be read"),
        ("lora_rr: 8\ntasks: {sql: {data_path: a}}", "lora_rr is no flag"),
        ("use_dora: true\ntasks: {sql: {data_path: a}}", "use_dora doesn't go with --tasks"),
        ("modules_to_save: [lm_head]\ntasks: {sql: {data_path: a}}", "modules_to_save doesn't go"),
        ("save_only_model: true\ntasks: {sql: {data_path: a}}", "save_only_model doesn't go"),
        ("dataloader_num_workers: 2\ntasks: {sql: {data_path: a}}", "dataloader_num_workers doesn't go"),
        ("debug: underflow_overflow\ntasks: {sql: {data_path: a}}", "debug doesn't go"),
        ("save_strategy: best\nmetric_for_best_model: loss\ntasks: {sql: {data_path: a}}", "doesn't go"),
        (
            "lr_scheduler_type: greedy\neval_share: 0.1\neval_strategy: epoch\ntasks: {sql: {data_path: a}}",
            "greedy doesn't",
        ),
    ],
)
def test_a_file_that_is_wrong_is_refused(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        read(tmp_path, content)


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"tasks\.yaml can't be read"):
        read_tasks(parse_arguments(["--tasks", str(tmp_path / "tasks.yaml"), "--output_dir", "out"]))
