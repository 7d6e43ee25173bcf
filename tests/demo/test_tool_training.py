"""How the adapter that calls functions is trained: by `manylora train`, so that the same files come out again."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from manylora.demo.tool_training import train_tools


class Asked(Exception):
    """The command was run: it isn't, here."""


def test_the_command_has_one_thread_whatever_the_machine_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over several threads come in another order on another number of cores."""
    environments: list[dict[str, str]] = []

    def run(_command: list[str], *, env: dict[str, str] | None = None, **_more: Any) -> None:
        environments.append(env or {})
        raise Asked

    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setenv("PATH", "/somewhere")
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(Asked):
        train_tools(tmp_path / "base", tmp_path / "out", 1)
    assert environments[0]["OMP_NUM_THREADS"] == "1"
    assert environments[0]["PATH"] == "/somewhere"
