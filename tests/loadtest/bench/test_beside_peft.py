"""`make bench` end to end on a tiny model: it serves, asks through HTTP, runs peft beside it and prints both."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from manylora.loadtest.bench import beside_peft

ROOT = Path(__file__).resolve().parents[3]
SMALL = ["--model", "tiny", "--streams", "2", "--busy-streams", "2", "--adapters", "2", "--rank", "4"]
SHORT = ["--input", "8", "--output", "4", "--requests", "2"]


@pytest.mark.slow
@pytest.mark.timeout(900)  # several processes that import torch: minutes on a busy machine
def test_both_sides_run_on_the_same_files(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    more = ["--quantization", "nf4", "--scratch", str(scratch), "--json", str(report)]
    command = [sys.executable, "-m", "manylora.loadtest.bench.beside_peft", *SMALL, *SHORT, *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("NF4", "ratio", "≥ 1.5 ×", "overhead", "event loop", "without HTTP"):
        assert word in done.stdout
    written = json.loads(report.read_text())
    (compared,) = written["compared"]
    (ours,), (theirs,) = compared["serve"], compared["peft"]
    assert ours["output_tokens"] == theirs["output_tokens"] == 8
    assert ours["errors"] == {}
    assert theirs["settings"]["directories"][1].endswith("adapter1")
    assert compared["ratio"] == ours["tokens_per_second"] / theirs["tokens_per_second"]
    assert list(scratch.iterdir()) == []


def test_what_can_t_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["compare", "--model", "tiny", "--scratch", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match=r"^manylora\.loadtest\.bench\.beside_peft: .*nowhere"):
        beside_peft.main()
