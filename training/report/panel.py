"""Draws a run's numbers: as a panel for a terminal, as one line for a file."""

import math
from collections.abc import Iterable

import psutil
import torch
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from manylora.training.report.meter import RunMeter

GIB = 1 << 30
BARS = "▁▂▃▄▅▆▇█"


def panel(meter: RunMeter) -> RenderableType:
    """Return the display: bar, losses, rates, memory, the last evaluation."""
    bar = Table.grid(padding=(0, 1), expand=True)
    bar.add_column(no_wrap=True)
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True, justify="right")
    bar.add_row(_where(meter), ProgressBar(max(1, meter.total_steps), meter.step), _times(meter))
    numbers = Columns([_pair(name, value) for name, value in _pairs(meter)], padding=(0, 3))
    rows: list[RenderableType] = [bar, numbers]
    rows += [Text.assemble(("losses ", "dim"), (sparkline(meter.losses), "cyan"))] if meter.losses else []
    rows += [_evaluation(meter)] if meter.evaluation or meter.evaluating else []
    return Panel(Group(*rows), title="training", title_align="left", border_style="cyan", padding=(0, 1))


def line(meter: RunMeter) -> str:
    """Return the same numbers as one line."""
    parts = [f"step {meter.step}/{meter.total_steps}"]
    parts += [f"epoch {meter.epoch:.2f}"] if meter.epoch is not None else []
    parts += [f"{name} {value}" for name, value in _pairs(meter)]
    parts += [f"left {clock(meter.seconds_left)}"] if meter.seconds_left else []
    if meter.evaluation and meter.evaluated_at == meter.step:
        parts += [f"eval {name} {value:.4g}" for name, value in meter.evaluation.items()]
    return "  ".join(parts)


def _where(meter: RunMeter) -> Text:
    share = f"{100 * meter.step / meter.total_steps:.0f} %" if meter.total_steps else ""
    epochs = f"/{meter.epochs:g}" if meter.epochs else ""
    epoch = f"  epoch {meter.epoch:.2f}{epochs}" if meter.epoch is not None else ""
    return Text.assemble((f"step {meter.step}/{meter.total_steps}", "bold"), f"  {share}{epoch}")


def _times(meter: RunMeter) -> Text:
    left = meter.seconds_left
    return Text(
        f"{clock(meter.elapsed)} gone, {clock(left)} left" if left is not None else clock(meter.elapsed)
    )


def _pairs(meter: RunMeter) -> Iterable[tuple[str, str]]:
    """Yield what is known, as name and value."""
    known = (
        ("loss", meter.smoothed_loss, "{:.4g}"),
        ("learning rate", meter.learning_rate, "{:.2e}"),
        ("gradient norm", meter.gradient_norm, "{:.3g}"),
        ("rank", meter.rank, "{}"),
        ("tokens/s", meter.tokens_per_second, "{:,.0f}"),
        ("trained tokens/s", meter.trained_tokens_per_second, "{:,.0f}"),
    )
    yield from ((name, form.format(value)) for name, value, form in known if value is not None)
    yield "memory", memory()


def _pair(name: str, value: str) -> Text:
    return Text.assemble((f"{name} ", "dim"), value, no_wrap=True)


def _evaluation(meter: RunMeter) -> Text:
    if meter.evaluating is not None:
        done, total = meter.evaluating
        return Text(f"evaluating: batch {done}{f' of {total}' if total else ''}", style="yellow")
    found = "  ".join(f"{name} {value:.4g}" for name, value in meter.evaluation.items())
    return Text.assemble((f"evaluation at step {meter.evaluated_at}  ", "dim"), (found, "green"))


def sparkline(values: Iterable[float]) -> str:
    """Return the values as little bars between the least and the greatest; what isn't finite is a ×."""
    numbers = list(values)
    finite = [value for value in numbers if math.isfinite(value)]
    if not finite:
        return "×" * len(numbers)
    least, most = min(finite), max(finite)
    scale = (len(BARS) - 1) / (most - least) if most > least else 0.0
    return "".join(BARS[round((v - least) * scale)] if math.isfinite(v) else "×" for v in numbers)


def clock(seconds: float | None) -> str:
    """Return seconds as 1:02:03, or 2:03 under an hour."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def memory() -> str:
    """Return what this process holds: on the accelerator where there is one (and its peak), else in RAM."""
    if torch.cuda.is_available():
        now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        return f"{now / GIB:.2f} GiB (peak {peak / GIB:.2f})"
    return f"{psutil.Process().memory_info().rss / GIB:.2f} GiB"
