"""What the check of eight judges calls a pass, and that it passes on a small base."""

import sys

import pytest

from manylora.loadtest.checks import judges
from manylora.loadtest.checks.judges import INVOCATION, Figures, Judged
from manylora.loadtest.material.engines import BLOCK

TALK = 10 * BLOCK + 4


def figures(seconds: float = 0.1, computed: int = 4 + INVOCATION, first: int = TALK + INVOCATION) -> Figures:
    return Figures(TALK, [Judged(1.0, first), Judged(0.05, 4), Judged(seconds, computed)], [])


def test_both_promises_must_be_kept() -> None:
    assert figures().met
    assert not figures(seconds=0.11).met, "a first token that takes more than its share"
    assert not figures(computed=BLOCK + 4 + INVOCATION).met, "a block that was computed again"
    assert not figures(first=4).met, "a conversation that was known before"


@pytest.mark.slow
def test_a_small_base_keeps_them_but_for_the_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["judges", "--shape", "tiny", "--kernels", "plain", "--tokens", "500", "--judges", "3"]
    monkeypatch.setattr(sys, "argv", [*words, "--rounds", "1", "--threads", "1"])
    judges.main()
    told = capsys.readouterr().out
    assert "pass: the conversation of 500 tokens is computed once" in told
    assert [line.split()[2] for line in told.splitlines() if line.startswith("aLoRA")] == ["503", "7", "7"]
    assert [line.split()[2] for line in told.splitlines() if line.startswith("LoRA")] == ["503", "503"]
