"""The table of ranks says mean and spread of each method's runs at each rate."""

import json
import subprocess
import sys
from pathlib import Path


def outcome(method: str, rate: float, seed: int, loss: float) -> dict[str, object]:
    names = ("method", "rate", "seed", "eval_loss", "train_seconds", "cpu_seconds", "peak_memory_gib")
    values = (method, rate, seed, loss, 10.0 + seed, 20.0, 0.5)
    return {**dict(zip(names, values, strict=True)), "trained_parameters": 81_920}


def test_runs_of_a_method_at_a_rate_become_one_line(tmp_path: Path) -> None:
    runs = [("b", 0.01, 0, 0.1), ("a", 0.01, 0, 0.2), ("b", 0.01, 1, 0.3), ("b", 0.001, 0, 0.4)]
    (tmp_path / "kept.json").write_text(json.dumps({"outcomes": [outcome(*run) for run in runs]}))
    words = [sys.executable, "-m", "manylora.loadtest.lab.rank_table", "--of", str(tmp_path / "kept.json")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines[2:]] == [["a", "0.01"], ["b", "0.001"], ["b", "0.01"]]
    assert "0.2000 ± 0.1414" in lines[4]
    assert "10.5 ± 0.7" in lines[4]
    assert "81,920" in lines[4]
    assert "±" not in lines[2]
