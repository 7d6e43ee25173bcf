"""What is said while a base loads: a bar on a terminal, else a line now and then, and nothing of a short one."""

import io
import json
import sys

import pytest

from manylora import loading
from manylora.loading import BETWEEN, FIRST, told
from manylora.logs import Voice, configure_logs
from manylora.server.config import ServeSettings
from tests.manylora.test_logs import Stderr

GB = 1_000_000_000


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


pytestmark = pytest.mark.usefixtures("logging_as_it_was")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(loading, "time", made)
    return made


def voice(monkeypatch: pytest.MonkeyPatch, log_format: str, *, terminal: bool) -> tuple[Voice, io.StringIO]:
    stderr = Stderr(terminal=terminal)
    monkeypatch.setattr(sys, "stderr", stderr)
    settings = ServeSettings.model_validate({"log_format": log_format})
    configure_logs(settings)
    return Voice(settings), stderr


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_where_nobody_watches_a_line_is_written_now_and_then(
    log_format: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    speaker, stderr = voice(monkeypatch, log_format, terminal=False)
    with told("seven", speaker) as hear:
        for tenth in range(1, 151):  # a minute and a half, in steps of 0.6 s
            clock.now += 0.6
            hear(tenth * GB // 10, 15 * GB)
    lines = stderr.getvalue().splitlines()
    assert len(lines) == pytest.approx(1 + (90 - FIRST) / (BETWEEN + 0.3), abs=2)
    if log_format == "json":
        first = json.loads(lines[0])
        assert first["event"] == "loading seven: 0.4 of 15.0 GB"
        assert (first["loaded"], first["of"]) == (4 * GB // 10, 15 * GB)
    else:
        assert lines[0] == "loading seven: 0.4 of 15.0 GB"


def test_of_a_short_loading_nothing_is_said(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    speaker, stderr = voice(monkeypatch, "console", terminal=False)
    with told("demo", speaker) as hear:
        for done in range(1, 11):
            clock.now += FIRST / 11
            hear(done, 10)
        clock.now += 100
        hear(10, 10)
    assert stderr.getvalue() == ""


def test_on_a_terminal_there_is_a_bar_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    speaker, stderr = voice(monkeypatch, "auto", terminal=True)
    with told("seven", speaker) as hear:
        hear(4 * GB, 15 * GB)
    assert "loading seven" in stderr.getvalue()
    assert "4.0/15.0 GB" in stderr.getvalue()
