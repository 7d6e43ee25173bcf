"""The plots of a search for a learning rate, as SVG."""

import io
import math
from typing import TYPE_CHECKING

from manylora.training.report.axes import Axis, tick_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from manylora.training.rate.find import Choice
    from manylora.training.rate.sweep import Sweep

TICKS = 6
SIZE = (9.0, 3.6)
"""Inches."""


def plot_choice(choice: "Choice") -> str:
    """Draw the range test and the trials' held-out losses over the rates, both logarithmic, and mark the chosen one."""
    figure = _figure()
    axes = figure.subplots()
    curve = choice.curve
    axes.plot(curve.rates, curve.losses, color="0.85", linewidth=1)
    axes.plot(curve.rates, curve.smoothed, color="0.6", label="range test, smoothed")
    for steps in sorted({each.steps for each in choice.trials}):
        trials = [each for each in choice.trials if each.steps == steps and math.isfinite(each.loss)]
        points = sorted((each.rate, each.loss) for each in trials)
        axes.plot(
            [rate for rate, _ in points], [loss for _, loss in points], marker="o", label=f"{steps} steps"
        )
    axes.axvline(choice.rate, color="C3", linestyle="--", label=f"chosen: {choice.rate:.1e}")
    axes.set(
        xscale="log", yscale="log", xlabel="learning rate", ylabel="held-out loss", title="Learning rate"
    )
    plain_numbers(axes)
    axes.legend()
    return _svg(figure)


def plain_numbers(axes: "Axes") -> None:
    """Write the losses as numbers, where powers of ten alone would leave an axis without any."""
    from matplotlib.ticker import NullLocator

    ticks = Axis(*axes.get_ylim(), 0.0, 1.0, log=True).ticks(TICKS)
    axes.set_yticks(ticks, [tick_text(value) for value in ticks])
    axes.yaxis.set_minor_locator(NullLocator())


def plot_sweep(sweep: "Sweep") -> str:
    """Draw every trial's held-out loss over its learning rate, by rank; hollow are those that were stopped early."""
    figure = _figure()
    axes = figure.subplots()
    for colour, rank in enumerate(sorted({each.rank for each in sweep.results})):
        of_rank = [each for each in sweep.results if each.rank == rank]
        axes.scatter(
            [each.rate for each in of_rank],
            [each.loss for each in of_rank],
            edgecolors=f"C{colour}",
            facecolors=["none" if each.stopped else f"C{colour}" for each in of_rank],
            label=f"rank {rank}",
        )
    axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="held-out loss", title="Sweep")
    plain_numbers(axes)
    axes.legend()
    return _svg(figure)


def _figure() -> "Figure":
    from matplotlib.figure import Figure

    # Not through pyplot, which keeps figures and looks for a screen.
    return Figure(figsize=SIZE, layout="constrained")


def _svg(figure: "Figure") -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()
