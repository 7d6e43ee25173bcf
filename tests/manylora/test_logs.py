"""Lines for people on terminals, JSON elsewhere; never colours in a file, never a line of another kind."""

import io
import json
import logging
import sys
import warnings

import pytest
import structlog

from manylora.logs import Voice, configure_logs
from manylora.server.config import ServeSettings

ESCAPE = "\x1b"


class Stderr(io.StringIO):
    """A file or, with ``terminal``, what looks like a terminal."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


pytestmark = pytest.mark.usefixtures("logging_as_it_was")


def written(monkeypatch: pytest.MonkeyPatch, log_format: str, *, terminal: bool) -> str:
    """Return what a server writes with such a stderr: a request's line, a library's, a warning, and its own voice."""
    stderr = Stderr(terminal=terminal)
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.delenv("NO_COLOR", raising=False)
    settings = ServeSettings.model_validate({"log_format": log_format})
    configure_logs(settings)
    voice = Voice(settings)
    structlog.get_logger("manylora.access").info(
        "request", status=404, reason="no [model]", path="/a\nb\x1b[2J"
    )
    logging.getLogger("somebody").warning("a library's line")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("a warning", stacklevel=1)
    voice.show("manylora", {"KV cache": "9 blocks [x]", "embedding, head": "1 MiB"}, "listening on U")
    voice.say("draining 1", running=1)
    voice.warn("adapter [a] is unavailable", adapter="a")
    try:
        raise RuntimeError("x")
    except RuntimeError:
        structlog.get_logger("manylora").exception("unexpected error")
    return stderr.getvalue()


def test_lines_go_to_what_stderr_is_when_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Stderr(terminal=False), Stderr(terminal=False)
    monkeypatch.setattr(sys, "stderr", first)
    configure_logs(ServeSettings.model_validate({"log_format": "json"}))
    first.close()
    monkeypatch.setattr(sys, "stderr", second)
    structlog.get_logger("manylora.access").info("request", status=200)
    [line] = second.getvalue().splitlines()
    assert json.loads(line)["event"] == "request"


@pytest.mark.parametrize(("log_format", "terminal"), [("auto", False), ("json", False), ("json", True)])
def test_machines_get_one_json_object_a_line(
    monkeypatch: pytest.MonkeyPatch, log_format: str, terminal: bool
) -> None:
    lines = [json.loads(line) for line in written(monkeypatch, log_format, terminal=terminal).splitlines()]
    by_event = {line["event"]: line for line in lines}
    assert (by_event["request"]["status"], by_event["request"]["reason"]) == (404, "no [model]")
    assert by_event["request"]["path"] == "/a\nb\x1b[2J"
    assert by_event["a library's line"]["level"] == "warning"
    assert (
        by_event["listening on U"].items() >= {"KV_cache": "9 blocks [x]", "embedding_head": "1 MiB"}.items()
    )
    assert (by_event["draining 1"]["running"], by_event["draining 1"]["level"]) == (1, "info")
    assert by_event["adapter [a] is unavailable"]["level"] == "warning"
    assert "RuntimeError: x" in by_event["unexpected error"]["exception"]
    assert any("a warning" in event for event in by_event)


@pytest.mark.parametrize(("log_format", "terminal"), [("auto", True), ("console", True), ("console", False)])
def test_people_get_text(monkeypatch: pytest.MonkeyPatch, log_format: str, terminal: bool) -> None:
    text = written(monkeypatch, log_format, terminal=terminal)
    for words in ("request", "a library's line", "9 blocks [x]", "draining 1", "adapter [a] is unavailable"):
        assert words in text
    for line in text.splitlines():
        assert not line.startswith("{")


def test_what_clients_send_neither_steers_a_terminal_nor_begins_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = written(monkeypatch, "auto", terminal=True)
    assert "[2J" in text
    assert f"{ESCAPE}[2J" not in text
    assert "\nb" not in text


def test_only_terminals_get_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # which many build machines set
    for log_format in ("auto", "json", "console"):
        assert ESCAPE not in written(monkeypatch, log_format, terminal=False)
    assert ESCAPE in written(monkeypatch, "auto", terminal=True)


def test_tracebacks_show_no_local_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    text = written(monkeypatch, "auto", terminal=True)
    assert "RuntimeError: x" in text
    assert "locals" not in text
