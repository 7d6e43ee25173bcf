"""What structured output lets through, in small; the command does two thousand schemas, and a suite's."""

import json
from pathlib import Path

import pytest

from manylora.loadtest.checks.held_to_schemas import main

CASES = [
    {
        "description": "bounds",
        "schema": {"type": "integer", "minimum": 3},
        "tests": [
            {"description": "over", "data": 4, "valid": True},
            {"description": "under", "data": 2, "valid": False},
        ],
    },
    {"description": "negation", "schema": {"not": {"type": "null"}}, "tests": []},
]


def test_random_schemas(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--schemas", "150"]) == 0
    told = capsys.readouterr().out
    assert "refused" in told
    assert "ended" in told


def test_a_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cases.json").write_text(json.dumps(CASES))
    assert main(["--suite", str(tmp_path)]) == 0
    assert "1 invalid, not, 1 refused, 1 taken, 1 valid, accepted" in capsys.readouterr().out


def test_what_is_wrongly_accepted_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CASES[0]["tests"][0]["valid"] = False  # type: ignore[index]  # a case that tells an untruth
    (tmp_path / "cases.json").write_text(json.dumps(CASES))
    assert main(["--suite", str(tmp_path)]) == 1
    assert "cases.json: bounds: over: 4" in capsys.readouterr().out
