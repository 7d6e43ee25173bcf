"""`manylora data check` as a user runs it: exit statuses, one line on bad input, JSON."""

import json
from pathlib import Path

from typer.testing import CliRunner

from manylora.data_command import app
from tests.training.check.making import good, write

run = CliRunner().invoke


def test_findings_end_with_0_and_with_1_when_strict(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [good(1), good(1)])
    shown = run(app, ["check", path])
    assert shown.exit_code == 0
    assert "Exact duplicates" in shown.output
    assert run(app, ["check", path, "--strict"]).exit_code == 1
    assert run(app, ["check", path, "--strict", "--ignore", "exact-duplicate"]).exit_code == 0


def test_json_alone_is_printed(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [good(1), good(1)])
    value = json.loads(run(app, ["check", path, "--json"]).stdout)
    assert value["findings"][0]["lines"] == {path: [2]}


def test_bad_input_is_one_line_and_status_2(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [good(1)])
    for arguments in (
        [str(tmp_path / "none.jsonl")],
        [path, "--eval", str(tmp_path / "none.jsonl")],
        [path, "--ignore", "nothing"],
        [path, "--base", str(tmp_path / "none")],
        [path, "--fix", path],
        [path, "--remove", "exact-duplicate"],
        [path, "--fix", str(tmp_path / "clean.jsonl"), "--remove", "nothing"],
        [path, "--format", "openai"],
        [path, "--columns", "prompt"],
        [path, "--columns", "prompt=ticket"],
        [path, "--html", path],
        [path, "--html", str(tmp_path / "none" / "page.html")],
    ):
        result = run(app, ["check", *arguments])
        assert result.exit_code == 2, arguments
        assert len(result.stderr.splitlines()) == 1, result.stderr


def test_a_cleaned_file_and_a_page(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [good(1), good(1)])
    result = run(
        app,
        [
            *("check", path, "--fix", str(tmp_path / "clean.jsonl"), "--remove", "exact-duplicate"),
            *("--html", str(tmp_path / "page.html")),
        ],
    )
    assert result.exit_code == 0
    assert "left out 1 (exact-duplicate)" in result.output
    assert (tmp_path / "clean.jsonl").read_text().count("\n") == 1
    assert (tmp_path / "page.html").is_file()


def test_a_warning_takes_nothing_out_unless_it_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [good(1), good(1)])
    result = run(app, ["check", path, "--fix", str(tmp_path / "all.jsonl")])
    assert "kept, with warnings: exact-duplicate 1" in result.output
    assert (tmp_path / "all.jsonl").read_text().count("\n") == 2
    run(app, ["check", path, "--fix", str(tmp_path / "one.jsonl"), "--remove", "exact-duplicate"])
    assert (tmp_path / "one.jsonl").read_text().count("\n") == 1


def test_what_is_not_shown_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [good(1)] * 74)
    assert "Exact duplicates (3 of 73 shown)" in run(app, ["check", path]).output


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("ticket,label\nWhere is it?,here\n")
    refused = run(app, ["check", str(path)])
    assert refused.exit_code == 2
    assert "--columns prompt=ticket,completion=label" in refused.stderr
    checked = run(app, ["check", str(path), "--columns", "prompt=ticket,completion=label"])
    assert checked.exit_code == 0
    assert "(prompt-completion)" in checked.output


def test_half_an_emoji_can_be_printed_as_json(tmp_path: Path) -> None:
    path = write(
        tmp_path / "data.jsonl", [good(1), json.dumps({"text": "\ud83d"}), json.dumps({"\ud83d": 1})]
    )
    value = json.loads(run(app, ["check", path, "--json"]).stdout)
    assert value["findings"][0]["lines"] == {path: [2, 3]}
