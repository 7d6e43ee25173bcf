"""From the flags of a run to its data: one path, whatever the flags, and nothing passed over in silence."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from manylora.training.arguments import FORMAT_NAMES
from manylora.training.data.dataset import TrainingData
from manylora.training.data.formats import format_named
from manylora.training.data.render import IGNORED
from manylora.training.errors import InvalidArgument, InvalidData
from manylora.training.parser import make_parser
from manylora.training.parsing import parse_arguments
from manylora.training.preparation import check_files, holds_conversations, load_sets
from tests.training.data.families import tokenizer_of

DEMO = Path(__file__).resolve().parents[2] / "demo" / "base"
LEAST = ("--use_lora", "--output_dir", "out", "--model_max_length", "60")


def row(question: str, answer: str, **more: object) -> dict[str, object]:
    turns = [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]
    return {"conversations": turns, **more}


def write(path: Path, *rows: object) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def load(*flags: str) -> tuple[TrainingData, TrainingData | None, list[str]]:
    """What a run with these flags gets, and what it says."""
    base: Any = SimpleNamespace(
        tokenizer=tokenizer_of("chatml"), model=SimpleNamespace(generation_config=None)
    )
    said: list[str] = []
    return *load_sets(parse_arguments([*LEAST, *flags]), base, said.append), said


@pytest.mark.parametrize("packing", [(), ("--packing",)])
def test_lazy_preprocess_is_checked_as_all_else_is(tmp_path: Path, packing: tuple[str, ...]) -> None:
    good = [row(f"What is {n}?", "Hello") for n in range(3)]
    path = write(tmp_path / "a.jsonl", *good, row("What " * 40, "Hello"))
    eager, _, told = load("--data_path", path, *packing)
    lazy, _, said = load("--data_path", path, "--lazy_preprocess", "True", *packing)
    assert [*map(dict, lazy.dataset)] == [*map(dict, eager.dataset)]
    assert all(set(item["labels"]) != {IGNORED} for item in lazy.dataset)
    assert lazy.report == eager.report
    assert lazy.report.dropped.first == [f"{path}:4"]
    assert list(lazy.lengths) == list(eager.lengths)
    assert said[1:] == told
    assert said[0].startswith("--lazy_preprocess is not needed: ")
    bad = write(tmp_path / "b.jsonl", *good, {"conversations": [{"from": "user", "value": "What?"}]})
    with pytest.raises(InvalidData, match=r"b\.jsonl:4: there is no message of the assistant"):
        load("--data_path", bad, "--lazy_preprocess", "True", *packing)


def test_every_format_that_is_offered_is_taken(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", row("What?", "Hello"))
    told = make_parser().format_help()
    for name in FORMAT_NAMES:
        assert format_named(name).name == name
        assert name in told
        assert parse_arguments([*LEAST, "--data_path", path, "--data_format", name]).data.data_format == name
    for name in ("openai", "completion"):
        with pytest.raises(InvalidArgument, match=rf"--data_format.*: invalid choice: '{name}'"):
            parse_arguments([*LEAST, "--data_path", path, "--data_format", name])


def test_columns_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("ticket,label,id\nWhere is it?,3,7\n")
    flags = ("--data_path", str(path), "--columns", "prompt=ticket,completion=label")
    train, _, said = load(*flags)
    assert [message["content"] for message in train.example(0).messages] == ["Where is it?", "3"]
    assert f"{path}: fields that were not read: id (1 row)." in said
    assert holds_conversations(parse_arguments([*LEAST, *flags]))
    as_text = ("--data_path", str(path), "--columns", "text=ticket")
    assert not holds_conversations(parse_arguments([*LEAST, *as_text]))
    assert load(*as_text)[0].example(0).text == "Where is it?"


def test_the_check_before_a_run_reads_what_the_run_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("ticket,label,text\nWhere is it?,,x\n")
    flags = [*LEAST, "--model_name_or_path", str(DEMO), "--data_path", str(path)]
    said: list[str] = []

    def check(*more: str) -> list[str]:
        report = check_files(parse_arguments([*flags, *more]), said.append)
        assert report is not None
        return [report.files[0].format, *(finding.kind.name for finding in report.findings)]

    assert check() == ["text"]
    assert check("--columns", "prompt=ticket,completion=label") == ["prompt-completion", "empty"]
    assert check("--columns", "prompt=ticket,completion=label", "--data_format", "text") == ["text"]
    with pytest.raises(InvalidArgument, match="no column 'lable'"):
        check("--columns", "completion=lable")


def test_strict_says_how_findings_are_taken_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[row("What?", "Hello")] * 2)
    flags = [*LEAST, "--model_name_or_path", str(DEMO), "--data_path", path, "--data_check", "strict"]
    with pytest.raises(InvalidData, match="with --remove KIND without the warnings that you name"):
        check_files(parse_arguments(flags), print)


def test_what_is_wrong_with_held_out_data_is_said_too(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", row("What?", "Hello"))
    held_out = write(tmp_path / "b.jsonl", row("What?", "Hello", id=3), row("What " * 40, "Hello"))
    _, found, said = load("--data_path", train, "--eval_data_path", held_out)
    assert found is not None
    assert found.report.examples == 1
    assert f"Held out: {held_out}: fields that were not read: id (1 row)." in said
    assert any(one.startswith(f"Held out: 1 example ({held_out}:2) left out") for one in said)
