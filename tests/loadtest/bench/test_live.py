"""The live display: drawn on a terminal, silent elsewhere."""

import io

from rich.console import Console

from manylora.loadtest.bench.live import LiveDisplay, watching
from manylora.loadtest.bench.serve import Silent
from manylora.loadtest.material.answer import Answer


def drawn(display: LiveDisplay) -> str:
    console = Console(file=io.StringIO(), width=160, force_terminal=False)
    console.print(display)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_it_counts_a_phase_s_requests_tokens_and_errors() -> None:
    display = LiveDisplay()
    display.phase("measuring", 8)
    display.answered(Answer(0.0, 2.0, ["a", "b"], [0.25, 1.0]))
    assert "1/8 requests" in drawn(display)
    assert "first token 250 ms" in drawn(display)
    assert "no errors" in drawn(display)
    display.answered(Answer(0.0, 2.0, error="cut off"))
    assert "2/8 requests" in drawn(display)
    assert "1 errors" in drawn(display)
    display.phase("asking each request alone", None)
    assert "0 requests" in drawn(display)


def test_only_a_terminal_is_drawn_on() -> None:
    terminal, pipe = io.StringIO(), io.StringIO()
    with watching(Console(file=pipe, force_terminal=False)) as watcher:
        assert isinstance(watcher, Silent)
    assert pipe.getvalue() == ""
    with watching(Console(file=terminal, force_terminal=True, width=120)) as watcher:
        watcher.phase("warm-up", 3)
    assert "warm-up" in terminal.getvalue()
