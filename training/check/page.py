"""The check as a page: a table of findings, rows to look at, and plots drawn as SVG. Needs nothing from elsewhere."""

import os
import tempfile
from html import escape
from pathlib import Path

from manylora.adapters.durable import make_ordinary
from manylora.training.check.report import CheckReport, Finding, Mix, Place

_STYLE = """
.data-check{font:15px/1.5 system-ui,sans-serif;color:#1c2430;max-width:60rem}
.data-check h3{margin:1.6em 0 .4em;font-size:1.05rem}
.data-check table{border-collapse:collapse;width:100%}
.data-check th,.data-check td{text-align:left;padding:.3em .8em .3em 0;border-bottom:1px solid #e1e5ea;
vertical-align:top}
.data-check .number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.data-check .error{color:#b3261e;font-weight:600}.data-check .warning{color:#8a5a00;font-weight:600}
.data-check .info{color:#44546a}
.data-check code{font:13px/1.4 ui-monospace,monospace;background:#f4f6f8;padding:.1em .3em;overflow-wrap:anywhere}
.data-check li{margin:.25em 0}.data-check .like{color:#5b6775}
.data-check svg{max-width:100%;height:auto}
.data-check svg text{font:12px system-ui,sans-serif;fill:#44546a}
.data-check .plots{display:flex;flex-wrap:wrap;gap:2rem}
"""
BAR, GAP, LABEL, WIDTH = 18, 6, 90, 300
LANGUAGES_SHOWN = 12


def section(report: CheckReport) -> str:
    """The report as a fragment of HTML, with its own style under the class data-check."""
    files = "".join(
        f"<li><code>{escape(file.path)}</code>: {rows:,} rows, {escape(file.format)}"
        + (", evaluation data" if file.evaluates else "")
        + "</li>"
        for file, rows in zip(report.files, report.rows_per_file, strict=True)
    )
    how = "estimated from characters" if report.estimated_lengths else "by the base's tokenizer"
    parts = [
        f'<section class="data-check"><style>{_STYLE}</style><h2>Data check</h2><ul>{files}</ul>',
        _findings_table(report),
        '<div class="plots">',
        f"<div><h3>Tokens of a row ({how})</h3>{_bars(report.lengths, ordered=True)}</div>",
        f"<div><h3>Languages</h3>{_bars(_shortened(report.languages), ordered=False)}</div>",
        "</div>",
        *(_examples(finding) for finding in report.findings),
        "</section>",
    ]
    return "\n".join(parts)


def write_page(report: CheckReport, path: Path) -> None:
    """Write the report as a page of its own. The file is whole or not there; one that is there is replaced."""
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>Data check</title>'
        "<style>body{margin:2rem auto;padding:0 1rem;max-width:60rem}</style></head><body>"
        f"{section(report)}</body></html>\n"
    )
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(page)
        make_ordinary(Path(temporary))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _findings_table(report: CheckReport) -> str:
    if not report.findings:
        return f"<p>{report.rows:,} rows checked, nothing found.</p>"
    rows = "".join(
        f'<tr><td class="{finding.severity}">{finding.severity}</td><td>{escape(finding.kind.title)}</td>'
        f'<td class="number">{finding.count:,}</td><td class="number">{finding.share:.2%}</td>'
        f"<td>{escape(finding.kind.says)}</td></tr>"
        for finding in report.findings
    )
    number = '<th class="number">'
    head = f"<tr><th></th><th>Finding</th>{number}Rows</th>{number}Share</th><th>Rows that …</th></tr>"
    return f"<table>{head}{rows}</table>"


def _examples(finding: Finding) -> str:
    rest = finding.count - len(finding.examples)
    more = f"<li>… {len(finding.examples)} of {finding.count:,} shown</li>" if rest else ""
    items = "".join(map(_example, finding.examples))
    return f'<h3 class="{finding.severity}">{escape(finding.kind.title)}</h3><ul>{items}{more}</ul>'


def _example(place: Place) -> str:
    like = f' <span class="like">see {escape(str(place.like))}</span>' if place.like else ""
    return f"<li>{escape(str(place))}{like}<br><code>{escape(place.excerpt)}</code></li>"


def _shortened(mix: Mix) -> Mix:
    """Gather the rarest names into one bar."""
    if len(mix.names) <= LANGUAGES_SHOWN:
        return mix
    rest = sum(mix.counts[LANGUAGES_SHOWN:])
    return Mix((*mix.names[:LANGUAGES_SHOWN], "others"), (*mix.counts[:LANGUAGES_SHOWN], rest))


def _bars(mix: Mix, *, ordered: bool) -> str:
    """Draw horizontal bars; the names of an ordered mix are the lower edges of bins."""
    if not mix.counts:
        return "<p>No rows.</p>"
    pairs = list(zip(mix.names, mix.counts, strict=True))
    if ordered:
        filled = [index for index, (_, count) in enumerate(pairs) if count]
        pairs = pairs[filled[0] : filled[-1] + 1] if filled else pairs[:1]
    most, total = max(mix.counts) or 1, sum(mix.counts) or 1
    drawn = []
    for index, (name, count) in enumerate(pairs):
        top = index * (BAR + GAP)
        width = max(WIDTH * count / most, 1 if count else 0)
        middle = top + BAR - 5
        label = f"{name} –" if ordered else name
        drawn.append(
            f'<text x="{LABEL - 8}" y="{middle}" text-anchor="end">{escape(label)}</text>'
            f'<rect x="{LABEL}" y="{top}" width="{width:.1f}" height="{BAR}" rx="2" fill="#4472a8"/>'
            f'<text x="{LABEL + width + 6:.1f}" y="{middle}">{count:,} ({count / total:.1%})</text>'
        )
    size = f"{LABEL + WIDTH + 130} {len(pairs) * (BAR + GAP)}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LABEL + WIDTH + 130}" viewBox="0 0 {size}" role="img">'
        f"{''.join(drawn)}</svg>"
    )
