"""Calls of tools, streamed and whole, in small; the command reads ten thousand outputs."""

import pytest

from manylora.loadtest.checks import tool_outputs
from manylora.server.chat.deltas import Content
from manylora.server.chat.reading import Reading


def test_outputs(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool_outputs.main(["--outputs", "80"]) == 0
    assert "calls" in capsys.readouterr().out


def test_what_differs_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A reader that lets a mark through where it is cut."""

    class Forgetful:
        thinking = may_think = False

        def push(self, text: str) -> list[Content]:
            return [Content(text.replace("{", ""))] if len(text) > 1 else [Content(text)]

        def end(self) -> list[Content]:
            return []

    monkeypatch.setattr(Reading, "parser", lambda self: Forgetful())
    assert tool_outputs.main(["--outputs", "4"]) == 1
    assert "streamed and whole differ" in capsys.readouterr().out
