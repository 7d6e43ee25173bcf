"""A run's report: one HTML file that loads nothing from anywhere and runs no script."""

import functools
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from manylora.training.evaluate.metrics import METRIC_NAMES
from manylora.training.report.charts import Marker, Series, line_chart, log_chart, smoothed, stacked_bars
from manylora.training.report.figures import Tile, figure, percent, readable, tiles
from manylora.training.report.panel import clock
from manylora.training.report.record import History, RunRecord, write_whole

TEMPLATE = "report.html"
SCORES = tuple(f"eval_{name}" for name in METRIC_NAMES.values())
FEW_POINTS = 12
"""So many losses are not smoothed."""


@dataclass(frozen=True, slots=True)
class Section:
    """One run as the page shows it."""

    record: RunRecord
    anchor: str
    tiles: tuple[Tile, ...]
    charts: tuple[Markup, ...]
    memory_chart: Markup
    check: Markup
    command: str


def write_report(record: RunRecord | Sequence[RunRecord], path: Path) -> None:
    """Write the report of one run, or of several on one page, whole or not at all. Raises OSError."""
    write_whole(path, report_html([record] if isinstance(record, RunRecord) else list(record)))


def report_html(records: Sequence[RunRecord]) -> str:
    """Return the page. Everything that comes from outside is escaped. Raises ValueError for no record."""
    if not records:
        raise ValueError("a report needs at least one run")
    sections = [section(record, f"run-{index}") for index, record in enumerate(records, start=1)]
    title = records[0].name if len(records) == 1 else f"{len(records)} adapters on {records[0].base.name}"
    page: str = _template().render(
        title=title,
        sections=sections,
        overview=overview(records),
        several=len(records) > 1,
        scores=score_names(records),
    )
    return page


def section(record: RunRecord, anchor: str) -> Section:
    """Draw one run."""
    return Section(
        record=record,
        anchor=anchor,
        tiles=tuple(tiles(record)),
        charts=tuple(chart for chart in curves(record) if chart),
        memory_chart=memory_chart(record),
        # The data check has escaped what it quotes; it knows which parts are markup.
        check=Markup(record.data.check_html),
        command=command_line(record.command),
    )


def curves(record: RunRecord) -> list[Markup]:
    """Return the plots of what was logged, all over the same steps."""
    history = record.history
    markers = [Marker(event.step, event.sentence) for event in history.events]
    best = record.results.published_step
    if best is not None:
        markers.append(
            Marker(best, "the best checkpoint, which is published", written=f"published: step {best}")
        )
    last = float(max([0, *(int(entry.get("step", 0)) for entry in history.log)]))
    loss = history.series("loss")
    noisy = len(loss) > FEW_POINTS
    losses = [
        Series("loss", loss, 0, faint=noisy),
        Series("smoothed", smoothed(loss) if noisy else [], 0),
        Series("eval loss", history.series("eval_loss"), 1, marks=True),
    ]
    ranks = [(float(change.step), float(change.rank)) for change in history.ranks]
    rank = Series("rank", ranks if len(ranks) > 1 else [], 4, stairs=True)
    scores = [
        Series(readable(key), history.series(key), 5 + index, marks=True)
        for index, key in enumerate(score_names([record]))
    ]
    answers = "Held-out answers" + (f": share of {scores[0].name}" if len(scores) == 1 else "")
    return [
        line_chart("Loss", losses, markers, last, "auto"),
        search_chart(record),
        line_chart("Learning rate", [_logged(history, "learning_rate", 2)], markers, last),
        line_chart("Gradient norm", [_logged(history, "grad_norm", 3)], markers, last, "auto"),
        line_chart("Rank", [rank], markers, last),
        line_chart(answers, scores, markers, last, "share"),
    ]


def search_chart(record: RunRecord) -> Markup:
    """Return the losses that decided on the learning rate, over the rates; nothing where none was looked for."""
    search = record.search
    rounds = sorted({steps for _, steps, _ in search.trials})
    series = [
        Series("range test", search.curve, 0, faint=True),
        *(
            Series(
                f"{steps:,} steps",
                sorted((rate, loss) for rate, length, loss in search.trials if length == steps),
                1 + index,
                marks=True,
            )
            for index, steps in enumerate(rounds)
        ),
    ]
    chosen = [] if search.rate is None else [Marker(search.rate, f"chosen: {search.rate:.2g}")]
    return log_chart("Held-out loss by learning rate", series, chosen, "learning rate")


def _logged(history: History, key: str, colour: int) -> Series:
    return Series(key.replace("_", " "), history.series(key), colour)


def score_names(records: Sequence[RunRecord]) -> list[str]:
    """Return the metrics of held-out answers that any of the runs has."""
    names = {name for record in records for name in record.evaluation.after}
    names |= {key for record in records for entry in record.history.log for key in entry}
    return [name for name in SCORES if name in names]


def overview(records: Sequence[RunRecord]) -> list[Markup]:
    """Return the plots that lay several runs over one another."""
    if len(records) < 2:
        return []
    trained = [
        Series(record.name, smoothed(record.history.series("loss")), index)
        for index, record in enumerate(records)
    ]
    evaluated = [
        Series(record.name, record.history.series("eval_loss"), index, marks=True)
        for index, record in enumerate(records)
    ]
    charts = [
        line_chart("Loss, smoothed", trained, scale="auto"),
        line_chart("Eval loss", evaluated, scale="auto"),
    ]
    return [chart for chart in charts if chart]


def memory_chart(record: RunRecord) -> Markup:
    """Return the plan beside what was measured."""
    memory = record.memory
    bars = {"planned": memory.planned} if memory.planned else {}
    if memory.measured_peak_gib is not None:
        bars = {**bars, "measured": {"measured peak": memory.measured_peak_gib}}
    return stacked_bars("Memory of a training step", bars, "GiB")


def command_line(words: Sequence[str]) -> str:
    """Return a command as a shell takes it, each flag with its values on a line of its own."""
    lines: list[str] = []
    for word in words:
        quoted = shlex.quote(word)
        if lines and not word.startswith("--"):
            lines[-1] += f" {quoted}"
        else:
            lines.append(quoted)
    return " \\\n    ".join(lines)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"figure": figure, "clock": clock, "percent": percent, "readable": readable}
    return environment


def _template() -> Template:
    return _environment().get_template(TEMPLATE)
