"""The report of `manylora bench serve` as one HTML file that loads nothing from anywhere. Plots are matplotlib's."""

import html
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from manylora.loadtest.bench.serve_report import ServeReport
from manylora.loadtest.material.answer import Answer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1180px; padding: 0 1rem; color: #1b1f24 }
pre { background: #f4f6f8; padding: 1rem; overflow-x: auto; font-size: 13px }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 1rem }
figure { margin: 0 } svg { width: 100%; height: auto }
"""
COLOURS = "#1f5fa8", "#c2571a", "#2f7d4f"
MOST_MODELS = 40
"""Bars that a plot holds: the worst served."""
BINS = 60


class NoPlots(ImportError):
    """matplotlib is not installed."""


def serve_page(report: ServeReport) -> str:
    """Return the page. Everything that comes from outside is escaped. Raises NoPlots."""
    answers = [each.answer for each in report.measured.finished if each.answer.error is None]
    began = report.measured.began
    plots: Sequence[tuple[str, Callable[[Axes], None]]] = (
        ("How long requests took", lambda axes: _shares(axes, answers)),
        ("First tokens over the run", lambda axes: _over_time(axes, answers, began)),
        ("Output tokens a second over the run", lambda axes: _tokens(axes, answers, began)),
        ("How evenly models were served", lambda axes: _models(axes, report)),
    )
    figures = "".join(f"<figure>{_svg(title, draw)}</figure>" for title, draw in plots)
    title = f"manylora bench serve: {html.escape(report.bench.url)}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"<h1>{title}</h1><pre>{html.escape(report.text())}</pre>"
        f'<div class="plots">{figures}</div></html>\n'
    )


def _svg(title: str, draw: Callable[["Axes"], None]) -> str:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise NoPlots("--html draws with matplotlib: pip install 'manylora[bench]'") from None
    with rc_context({"font.size": 9, "svg.hashsalt": "manylora", "svg.fonttype": "none"}):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _shares(axes: "Axes", answers: Sequence[Answer]) -> None:
    """Draw which share of requests was done within which time."""
    kinds: Sequence[tuple[str, list[float | None]]] = (
        ("first token", [answer.first_token_seconds for answer in answers]),
        ("each token after", [answer.seconds_per_token for answer in answers]),
        ("end to end", [answer.seconds for answer in answers]),
    )
    for (name, values), colour in zip(kinds, COLOURS, strict=True):
        ordered = sorted(1000 * value for value in values if value is not None)
        if ordered:
            shares = [100 * (number + 1) / len(ordered) for number in range(len(ordered))]
            axes.step(ordered, shares, where="post", label=name, color=colour)
    axes.set_xscale("log")
    axes.set_xlabel("ms")
    axes.set_ylabel("% of requests")
    if axes.lines:
        axes.legend(frameon=False)


def _over_time(axes: "Axes", answers: Sequence[Answer], began: float) -> None:
    points = [(a.asked - began, a.first_token_seconds) for a in answers if a.first_token_seconds is not None]
    axes.plot(
        [at for at, _ in points], [1000 * took for _, took in points], ".", color=COLOURS[0], markersize=4
    )
    axes.set_xlabel("asked after s")
    axes.set_ylabel("first token, ms")


def _tokens(axes: "Axes", answers: Sequence[Answer], began: float) -> None:
    times = [at - began for answer in answers for at in answer.times]
    if times:
        width = max(max(times) / BINS, 1e-9)
        axes.hist(times, bins=BINS, weights=[1 / width] * len(times), color=COLOURS[2], alpha=0.8)
    axes.set_xlabel("s")
    axes.set_ylabel("pieces of text a second")


def _models(axes: "Axes", report: ServeReport) -> None:
    shares = report.fairness.shares[:MOST_MODELS]
    axes.bar(range(len(shares)), [share.speed for share in shares], color=COLOURS[1])
    left_out = len(report.fairness.shares) - len(shares)
    if len(shares) <= 12:
        axes.set_xticks(range(len(shares)), [share.model for share in shares], rotation=30, ha="right")
    axes.set_xlabel(f"models, the worst served first{f'; {left_out} more' if left_out else ''}")
    axes.set_ylabel("tokens for each second waited")
