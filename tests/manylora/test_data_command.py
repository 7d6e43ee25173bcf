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
        [path, "--html", path],
        [path, "--html", str(tmp_path / "none" / "page.html")],
    ):
        result = run(app, ["check", *arguments])
        assert result.exit_code == 2, arguments
        assert len(result.stderr.splitlines()) == 1, result.stderr


def test_a_cleaned_file_and_a_page(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", [good(1), good(1)])
    result = run(
        app, ["check", path, "--fix", str(tmp_path / "clean.jsonl"), "--html", str(tmp_path / "page.html")]
    )
    assert result.exit_code == 0
    assert "left out 1 (exact-duplicate)" in result.output
    assert (tmp_path / "clean.jsonl").read_text().count("\n") == 1
    assert (tmp_path / "page.html").is_file()
