"""`manylora bench` as it is typed."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from manylora.loadtest.bench.cli import app
from manylora.loadtest.bench.options import fail
from tests.loadtest.fake_server import FakeServer, running

runner = CliRunner()
SMALL = ["--streams", "2", "--input", "8", "--output", "4", "--requests", "4"]


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeServer]:
    with running(FakeServer()) as server:
        yield server


def test_serve_prints_a_table_and_writes_json(fake: FakeServer, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = runner.invoke(app, ["serve", "--url", fake.url, *SMALL, "--check", "--json", str(report)])
    assert done.exit_code == 0, done.output
    for line in (
        "time to first token",
        "between tokens",
        "end to end",
        "tokens/s",
        "0 answers under load differ",
    ):
        assert line in done.output
    written = json.loads(report.read_text())
    assert written["succeeded"] == 4
    assert written["settings"]["workload"]["popularity"] == "uniform"
    assert written["client"]["versions"]["torch"]
    assert written["load_client"]["cpu_share"] > 0


def test_serve_ends_with_1_for_a_wrong_answer(fake: FakeServer) -> None:
    done = runner.invoke(app, ["serve", "--url", fake.url, *SMALL, "--adapters", "moody", "--check"])
    assert done.exit_code == 1
    assert "4 answers under load differ" in done.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--popularity", "zipf"], "ALPHA"),
        (["--url", "ftp://x"], "http://"),
        (["--url", "http://127.0.0.1:9"], "nothing answers"),
        (["--check", "--temperature", "1"], "--check compares greedy answers"),
        (["--duration", "3", "--requests", "4"], "give one of them"),
    ],
)
def test_bad_input_is_one_line_and_2(arguments: list[str], said: str) -> None:
    done = runner.invoke(app, ["serve", *arguments])
    assert done.exit_code == 2
    assert said in done.output
    assert len(done.output.strip().splitlines()) == 1


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_engine_shows_where_a_step_goes(quantization: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--model", "tiny", "--quantization", quantization, "--adapters", "3", "--rank", "4"]
    done = runner.invoke(app, ["engine", *SMALL, *options, "--json", str(report)])
    assert done.exit_code == 0, done.output
    for part in ("schedule", "place", "model", "sample", "commit", "sse", "overhead"):
        assert part in done.output
    written = json.loads(report.read_text())
    assert written["output_tokens"] == 16
    assert written["decode_steps"]["steps"] == 6
    assert 0 < written["decode_steps"]["overhead"] < 1
    assert sum(written["decode_steps"]["mean_seconds"].values()) == pytest.approx(
        written["decode_steps"]["total"]["mean"], rel=1e-6
    )


@pytest.mark.parametrize("adapters", ["0", "2"])
def test_engine_takes_the_base_alone_and_a_checkpoint(adapters: str, tmp_path: Path) -> None:
    from manylora.loadtest.material.checkpoints import write_base

    base = write_base(tmp_path / "base")
    done = runner.invoke(app, ["engine", *SMALL, "--model", str(base), "--adapters", adapters])
    assert done.exit_code == 0, done.output


def test_peft_generates_a_mixed_batch(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--model", "tiny", "--quantization", "none", "--adapters", "2", "--json", str(report)]
    done = runner.invoke(app, ["peft", *SMALL, *options])
    assert done.exit_code == 0, done.output
    written = json.loads(report.read_text())
    assert (written["batches"], written["output_tokens"]) == (2, 16)
    assert "adapter_names" in written["how"]


def test_peft_takes_the_same_files_in_nf4(tmp_path: Path) -> None:
    from manylora.loadtest.material.checkpoints import AdapterShape, write_adapter, write_base

    base = write_base(tmp_path / "base")
    adapters = [write_adapter(tmp_path / f"a{seed}", base, AdapterShape(4, seed=seed)) for seed in range(2)]
    named = [part for path in adapters for part in ("--adapter", str(path))]
    done = runner.invoke(app, ["peft", *SMALL, "--model", str(base), "--quantization", "nf4", *named])
    assert done.exit_code == 0, done.output
    assert "bitsandbytes NF4" in done.output


@pytest.mark.parametrize("command", ["engine", "peft"])
def test_a_model_that_is_not_there_is_one_line(command: str) -> None:
    done = runner.invoke(app, [command, "--model", "nowhere"])
    assert done.exit_code == 2
    assert "neither a directory nor one of" in done.output


def test_an_adapter_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = runner.invoke(app, ["peft", "--model", "tiny", "--adapter", str(tmp_path)])
    assert done.exit_code == 2
    assert "holds no adapter_config.json" in done.output


def test_what_stands_in_brackets_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    fail("pip install 'manylora[peft]'")
    assert capsys.readouterr().err == "manylora bench: pip install 'manylora[peft]'\n"
