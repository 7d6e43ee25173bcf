"""One export in a process of its own, at a low priority and with one thread: what streams lose to it is bounded."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

NICENESS = 15
"""Beside busy streams a few percent of a core, and what they leave. At 19 an export on a busy machine hardly moves."""
STOP_SECONDS = 5.0
"""After which a process that was asked to stop is killed."""
_ERROR_CHARACTERS = 300


class ExportProcess:
    """``python -m manylora.adapters.export`` under way; ended with the block.

    ``complaints`` takes its standard error.
    """

    def __init__(self, settings: str, niceness: int, complaints: Path) -> None:
        self._complaints = complaints
        with complaints.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "manylora.adapters.export", settings, str(niceness)],
                stdin=subprocess.PIPE,  # ends with this process, and then so does the other
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(),
            )

    def follow(self, hear: Callable[[str, float], None]) -> dict[str, Any] | str:
        """Call ``hear`` with stage and progress until the process ends (blocking); return the manifest or why not."""
        assert self._process.stdout is not None
        outcome: dict[str, Any] | str | None = None
        for line in self._process.stdout:
            said = json.loads(line)
            if "stage" in said:
                hear(said["stage"], said["progress"])
            else:
                outcome = said.get("result", said.get("error"))
        status = self._process.wait()
        return outcome or f"the export's process ended without a result: {self._last_complaint() or status}"

    def stop(self) -> None:
        """End the process: politely, then by force (blocking)."""
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> "ExportProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()

    def _last_complaint(self) -> str:
        try:
            lines = self._complaints.read_text(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1][:_ERROR_CHARACTERS] if lines else ""


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
