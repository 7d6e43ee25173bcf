"""`bench compare`: what counts as worse, and the exit status that says so."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from manylora.loadtest.bench.cli import app

runner = CliRunner()


def report(first: float, speed: float, *, seed: int = 0, spread: float = 0.1, samples: int = 200) -> Any:
    """A report whose first tokens take about ``first`` seconds, and which gives ``speed`` tokens/s."""
    rng = random.Random(seed)
    times = sorted(rng.gauss(first, spread * first) for _ in range(samples))
    summed = {"p50": times[len(times) // 2], "p99": times[-1], "mean": sum(times) / len(times)}
    return {
        "bench": "serve",
        "settings": {"workload": {"streams": 8}},
        "tokens_per_second": speed,
        "first_token_seconds": summed,
        "samples": [{"first_token_seconds": each, "error": None} for each in times],
    }


def compare(tmp_path: Path, before: Any, after: Any, *more: str) -> tuple[int, str]:
    for name, each in (("a", before), ("b", after)):
        (tmp_path / f"{name}.json").write_text(json.dumps(each))
    done = runner.invoke(app, ["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), *more])
    return done.exit_code, done.output


def test_the_same_again_is_no_regression(tmp_path: Path) -> None:
    code, said = compare(tmp_path, report(0.2, 100), report(0.2, 100, seed=1))
    assert code == 0
    assert "nothing got worse by more than 5 %" in said


def test_slower_is_1_and_faster_is_0(tmp_path: Path) -> None:
    code, said = compare(tmp_path, report(0.2, 100), report(0.3, 100, seed=1))
    assert code == 1
    assert "worse by more than 5 %: first token, s, p50" in said
    code, said = compare(tmp_path, report(0.3, 100), report(0.2, 100, seed=1))
    assert code == 0
    assert "better" in said


def test_a_figure_without_samples_counts_as_it_is_and_in_its_direction(tmp_path: Path) -> None:
    assert compare(tmp_path, report(0.2, 100), report(0.2, 94))[0] == 1
    assert compare(tmp_path, report(0.2, 100), report(0.2, 96))[0] == 0
    assert compare(tmp_path, report(0.2, 100), report(0.2, 140))[0] == 0
    assert compare(tmp_path, report(0.2, 100), report(0.2, 94), "--threshold", "10")[0] == 0


def test_what_chance_may_have_done_is_no_regression(tmp_path: Path) -> None:
    """The mean is 12 % longer, of ten requests that differ among themselves by as much as that again and again."""
    few = [report(0.2, 100, spread=0.0, samples=10) for _ in range(2)]
    for each, factor in zip(few, (1.0, 1.12), strict=True):
        values = [factor * value for value in (0.05, 0.4) * 5]
        each["samples"] = [{"first_token_seconds": value, "error": None} for value in values]
        each["first_token_seconds"] = {"p50": None, "p99": None, "mean": sum(values) / 10}
    code, said = compare(tmp_path, *few)
    assert code == 0
    assert "+12.0 %" in said
    for each in few:
        del each["samples"]
    assert compare(tmp_path, *few)[0] == 1


def test_other_settings_are_told(tmp_path: Path) -> None:
    other = report(0.2, 100)
    other["settings"] = {"workload": {"streams": 16}}
    assert "measured differently, workload.streams: 8 → 16" in compare(tmp_path, report(0.2, 100), other)[1]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"bench": "engine", "tokens_per_second": 1}, "of bench serve, the other of bench engine"),
        ({"tokens_per_second": 1}, "is no report"),
        ([], "is no report"),
        ({"bench": "serve"}, "no figure in common"),
    ],
)
def test_what_cannot_be_compared_is_one_line_and_2(tmp_path: Path, second: Any, said: str) -> None:
    code, output = compare(tmp_path, report(0.2, 100), second)
    assert code == 2
    assert said in output
    assert len(output.strip().splitlines()) == 1


def test_a_file_that_is_not_there_is_one_line_and_2(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    for arguments in ((str(tmp_path / "no.json"),) * 2, (str(tmp_path / "bad.json"),) * 2):
        done = runner.invoke(app, ["compare", *arguments])
        assert done.exit_code == 2
        assert len(done.output.strip().splitlines()) == 1
