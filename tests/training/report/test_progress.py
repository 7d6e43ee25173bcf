"""The live display: a panel on a terminal, lines elsewhere, and never the end of a run."""

import io
import logging
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from manylora.training.report import progress
from manylora.training.report.meter import RunMeter
from manylora.training.report.panel import clock, line, sparkline
from manylora.training.report.progress import LiveProgress
from tests.training.report.tiny_run import tiny_trainer


def console_of(*, terminal: bool) -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    return Console(file=written, force_terminal=terminal, width=110, color_system=None), written


def test_on_a_terminal_there_is_a_panel_with_the_last_state(tmp_path: Path) -> None:
    console, written = console_of(terminal=True)
    trainer = tiny_trainer(tmp_path)
    shown = LiveProgress.install(trainer, console)
    trainer.train()
    kinds = {type(callback) for callback in trainer.callback_handler.callbacks}
    assert LiveProgress in kinds
    assert not kinds & {ProgressCallback, PrinterCallback}
    last = written.getvalue().rsplit("╭─ training", 1)[1]
    for part in (
        "step 8/8",
        "100 %",
        "loss ",
        "learning rate ",
        "gradient norm ",
        "memory ",
        "evaluation at step 8",
    ):
        assert part in last
    assert not shown.broken


def test_elsewhere_there_are_lines_without_control_characters(tmp_path: Path) -> None:
    console, written = console_of(terminal=False)
    trainer = tiny_trainer(tmp_path)
    shown = LiveProgress.install(trainer, console)
    trainer.train()
    shown.say("[red] is no markup here")
    lines = written.getvalue().splitlines()
    assert lines[0].startswith("step 1/8")
    assert any("eval loss" in each for each in lines)
    assert any(each.startswith("step 8/8") for each in lines)
    assert lines[-1] == "[red] is no markup here"
    assert len(lines) <= 6
    assert "\x1b" not in written.getvalue()


def test_a_display_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(meter: RunMeter) -> str:
        raise OSError("no space on the terminal")

    monkeypatch.setattr(progress, "line", broken)
    console, _ = console_of(terminal=False)
    trainer = tiny_trainer(tmp_path)
    shown = LiveProgress.install(trainer, console)
    with caplog.at_level(logging.WARNING):
        assert trainer.train().global_step == 8
    assert shown.broken
    assert [record.message for record in caplog.records].count(
        "the progress display is off: no space on the terminal"
    ) == 1


def test_other_processes_show_nothing(tmp_path: Path) -> None:
    console, written = console_of(terminal=False)
    trainer = tiny_trainer(tmp_path)
    shown = LiveProgress.install(trainer, console)
    trainer.state.is_world_process_zero = False
    shown.on_train_begin(trainer.args, trainer.state, trainer.control)
    shown.on_log(trainer.args, trainer.state, trainer.control, logs={"loss": 1.0})
    assert written.getvalue() == ""


def test_a_run_that_fails_leaves_the_terminal_to_its_error(tmp_path: Path) -> None:
    console, written = console_of(terminal=True)

    class Failing(Trainer):
        def training_step(self, *_: Any, **__: Any) -> Any:
            raise ValueError("no more")

    trainer = tiny_trainer(tmp_path, kind=Failing)
    LiveProgress.install(trainer, console)
    with pytest.raises(ValueError, match="no more"):
        trainer.train()
    drawn = written.getvalue()
    assert drawn.rindex("\x1b[?25h") > drawn.rindex("╰─")  # the cursor is shown again, last
    with console.screen():
        pass


def test_closing_takes_the_panel_down_and_may_be_repeated(tmp_path: Path) -> None:
    console, _ = console_of(terminal=True)
    trainer = tiny_trainer(tmp_path)
    shown = LiveProgress.install(trainer, console)
    shown.on_train_begin(trainer.args, trainer.state, trainer.control)
    shown.close()
    shown.close()
    with console.screen():  # rich allows one live display at a time
        pass


def test_small_things() -> None:
    assert sparkline([1.0, 2.0, 3.0]) == "▁▅█"
    assert sparkline([1.0, float("nan"), 1.0]) == "▁×▁"
    assert sparkline([float("inf")]) == "×"
    assert [clock(value) for value in (None, 59.4, 61, 3661)] == ["–", "0:59", "1:01", "1:01:01"]
    assert line(RunMeter()).startswith("step 0/0")
