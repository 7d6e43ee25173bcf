"""The plots of a search for a learning rate, as SVG."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from manylora.training.rate.find import Choice
    from manylora.training.rate.sweep import Sweep

SIZE = (9.0, 3.6)
"""Inches."""


def plot_choice(choice: "Choice") -> str:
    """Draw the range test beside the trials' held-out losses; the chosen rate is marked."""
    figure = _figure()
    left, right = figure.subplots(1, 2)
    curve = choice.curve
    left.plot(curve.rates, curve.losses, color="0.75", linewidth=1, label="loss")
    left.plot(curve.rates, curve.smoothed, color="C0", label="smoothed")
    left.axvline(choice.rate, color="C3", linestyle="--", label=f"chosen: {choice.rate:.1e}")
    left.set(xscale="log", xlabel="learning rate", ylabel="held-out loss", title="Range test")
    low, high = min(curve.smoothed), curve.smoothed[0]
    left.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low) + 1e-6)
    left.legend()
    for steps in sorted({each.steps for each in choice.trials}):
        trials = sorted((each.rate, each.loss) for each in choice.trials if each.steps == steps)
        right.plot(*zip(*trials, strict=True), marker="o", label=f"{steps} steps")
    right.axvline(choice.rate, color="C3", linestyle="--")
    right.set(xscale="log", xlabel="learning rate", ylabel="held-out loss", title="Trials")
    rates = sorted({each.rate for each in choice.trials})
    right.minorticks_off()
    right.set_xticks(rates, [f"{rate:.1e}" for rate in rates])
    right.legend()
    return _svg(figure)


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
    axes.set(xscale="log", xlabel="learning rate", ylabel="held-out loss", title="Sweep")
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
