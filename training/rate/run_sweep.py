"""Runs `manylora train sweep`: prepares the job, sweeps, shows a table and writes it beside a plot."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.table import Table

from manylora.training import output
from manylora.training.arguments import Arguments
from manylora.training.distributed import check_sharding, is_first_process
from manylora.training.job import Job, total_steps
from manylora.training.memory.native_caches import keep_native_caches_small
from manylora.training.preparation import prepare
from manylora.training.rate.sweep import Result, Sweep, SweepSettings, check_sweep, sweep, write_sweep


def run_sweep(arguments: Arguments, settings: SweepSettings, say: Callable[[str], None]) -> Sweep:
    """Sweep and report. Nothing is trained for keeps: the best settings are printed as flags. Raises TrainingError."""
    keep_native_caches_small()
    check_sweep(arguments)
    directory = Path(arguments.training.output_dir)
    with output.alone(directory) if is_first_process() else nullcontext():
        return _sweep_alone(arguments, settings, directory, say)


def _sweep_alone(
    arguments: Arguments, settings: SweepSettings, directory: Path, say: Callable[[str], None]
) -> Sweep:
    check_sharding(arguments.training, searches=True, init=arguments.lora.init_lora_weights)
    if is_first_process():
        output.claim(directory, resume=False, overwrite=arguments.run.overwrite_output_dir)
    tell = say if is_first_process() else _silent
    prepared = prepare(arguments, lambda rows: total_steps(arguments.training, rows), tell)
    found = sweep(Job(arguments, prepared), settings, tell)
    if not is_first_process():
        return found
    Console(emoji=False).print(table_of(found))
    written = _written(found, directory)
    best = found.best
    say(
        f"Best: --learning_rate {best.rate:.2g} --lora_r {best.rank} --lora_alpha {best.alpha:g}"
        f" --warmup_steps {best.warmup:g}; {written}"
    )
    return found


def _written(found: Sweep, directory: Path) -> str:
    """Write table and plot; a disk that refuses them costs no more than the files."""
    try:
        write_sweep(found, directory)
    except OSError as error:
        return f"table and plot can't be written into {directory}: {error.strerror}"
    return f"table and plot are in {directory}"


def _silent(_: str) -> None:
    """Say nothing: one process of several speaks."""


def table_of(found: Sweep) -> Table:
    """Return the trials, best first."""
    table = Table("learning rate", "rank", "warm-up", "steps", "held-out loss", "")
    best = found.best if found.finished else None
    for each in sorted(found.results, key=lambda one: (one.stopped, one.loss)):
        table.add_row(
            f"{each.rate:.2e}",
            str(each.rank),
            f"{each.warmup:g}",
            str(each.steps),
            f"{each.loss:.4g}",
            _remark(each, best),
        )
    return table


def _remark(each: Result, best: Result | None) -> str:
    if each is best:
        return "best"
    return "stopped early" if each.stopped else ""
