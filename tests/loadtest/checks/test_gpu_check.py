"""`make gpu-check` on the CPU, in a process that has only what a bare GPU machine has."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from manylora.loadtest.checks import gpu_check

ROOT = Path(__file__).resolve().parents[3]
ABSENT = (
    "llguidance",
    "bitsandbytes",
    "fastapi",
    "httptools",
    "prometheus_client",
    "pydantic",
    "sqlalchemy",
    "starlette",
    "structlog",
    "uvicorn",
    "uvloop",
)
"""Not there: neither ours nor anybody's imports find them."""
NOT_OURS = ("httpx", "psutil", "rich", "typer", "yaml", "accelerate", "jinja2")
"""May come with transformers or peft, but the project's own files can't count on them."""
BARE_MACHINE = f"""
import runpy, sys
ABSENT, NOT_OURS, ROOT = {ABSENT!r}, {NOT_OURS!r}, {str(ROOT)!r}

class Bare:
    def __init__(self, finder):
        self._finder = finder

    def __getattr__(self, name):
        return getattr(self._finder, name)

    def find_spec(self, name, *rest):
        package = name.split(".")[0]
        if package in ABSENT:
            return None
        if package in NOT_OURS:
            frame = sys._getframe(1)
            while frame is not None and "importlib" in frame.f_code.co_filename:
                frame = frame.f_back
            file = frame.f_code.co_filename if frame is not None else ""
            if file.startswith(ROOT) and "site-packages" not in file:
                raise ImportError(f"{{file}} imports {{package}}")
        return self._finder.find_spec(name, *rest)

sys.meta_path[:] = [Bare(finder) for finder in sys.meta_path]
sys.argv = ["gpu_check", *sys.argv[1:]]
sys.path.insert(0, ROOT)
runpy.run_module("manylora.loadtest.checks.gpu_check", run_name="__main__")
"""


def bare(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", BARE_MACHINE, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(900)  # several processes that import torch: minutes on a busy machine
def test_all_of_it_runs_on_a_bare_machine(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = bare("--device", "cpu", "--small", "--json", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bitsandbytes is not installed" in done.stdout
    written = json.loads(report.read_text())
    assert len(written["checks"]) >= 28
    assert all(check["passed"] for check in written["checks"])
    assert [figure["bench"] for figure in written["figures"]] == ["engine", "peft", "engine"]
    assert "bitsandbytes" not in done.stderr


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu_check.main()
