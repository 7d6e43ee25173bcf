"""Signals: the first is remembered, the second ends a process that is alone."""

import signal

import pytest

from manylora.training.loop.interrupt import SIGNALS, Signals


@pytest.mark.parametrize("number", SIGNALS)
def test_the_second_signal_ends_a_run_of_one_process_at_once(number: signal.Signals) -> None:
    signals = Signals()
    before = signal.getsignal(number)
    signals.take()
    try:
        signal.raise_signal(number)
        assert signals.heard
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    finally:
        signals.release()
    assert signal.getsignal(number) is before


def test_one_of_several_processes_hears_what_the_launcher_passes_on_and_finishes_its_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    signals = Signals()
    signals.take()
    try:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    finally:
        signals.release()
    assert signals.heard
