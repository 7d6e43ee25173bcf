"""Plots as inline SVG. Colours come from the page's style sheet, so that they suit a light and a dark page."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from markupsafe import Markup, escape

from manylora.training.report.axes import Axis, axis_over, tick_text

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 30, 38
NOTHING = Markup()
MOST_POINTS = 600
LOG_ROOM = 1.2
"""Around the values of a logarithmic axis."""
MOST_MARKS = 60
"""Points of a line that get a mark with its numbers."""
WINDOW_SHARE = 0.06
"""Of a line's points: how many a smoothed point is the mean of."""

Point = tuple[float, float]
Scale = Literal["linear", "auto", "share"]


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a plot."""

    name: str
    points: Sequence[Point]
    colour: int
    """Which of the style sheet's colours, from 0."""
    faint: bool = False
    stairs: bool = False
    """Whether a value holds until the next."""
    marks: bool = False


@dataclass(frozen=True, slots=True)
class Marker:
    """A moment that a plot shows as an upright line."""

    step: float
    label: str
    """Shown where the line is pointed at."""
    written: str = ""
    """Shown beside it."""


def line_chart(
    title: str,
    series: Sequence[Series],
    markers: Sequence[Marker] = (),
    last_step: float = 0.0,
    scale: Scale = "linear",
) -> Markup:
    """Return a plot over optimiser steps, to ``last_step`` at least; an empty string if there is nothing to draw.

    With scale `auto` the value axis is logarithmic where positive values span more than `LOG_FROM_RATIO`; `share` is
    from 0 to 1.
    """
    drawn = [one for one in series if one.points]
    if not drawn:
        return Markup()
    steps = [x for one in drawn for x, _ in one.points]
    values = [y for one in drawn for _, y in one.points]
    across = Axis(min(0.0, *steps), max(*steps, last_step, 1.0), LEFT, WIDTH - RIGHT)
    if scale == "share":
        up = Axis(0.0, 1.0, HEIGHT - BOTTOM, TOP)
    else:
        up = axis_over(values, HEIGHT - BOTTOM, TOP, may_be_log=scale == "auto")
    parts = [*_frame(across, up), *_legend(drawn)]
    parts += [_marker(across, marker) for marker in markers if across.low <= marker.step <= across.high]
    for one in drawn:
        parts.append(_line(one, across, up))
    kind = " (logarithmic)" if up.log else ""
    return _figure(title + kind, WIDTH, HEIGHT, parts)


def log_chart(title: str, series: Sequence[Series], markers: Sequence[Marker], across_name: str) -> Markup:
    """Return a plot with both axes logarithmic; an empty string if there is nothing to draw.

    What is not above 0, and what is infinite, is left out.
    """
    drawn = [
        replace(one, points=[(x, y) for x, y in one.points if x > 0 and 0 < y < math.inf]) for one in series
    ]
    drawn = [one for one in drawn if one.points]
    if not drawn:
        return Markup()
    xs = [x for one in drawn for x, _ in one.points]
    ys = [y for one in drawn for _, y in one.points]
    across = Axis(min(xs) / LOG_ROOM, max(xs) * LOG_ROOM, LEFT, WIDTH - RIGHT, log=True)
    up = Axis(min(ys) / LOG_ROOM, max(ys) * LOG_ROOM, HEIGHT - BOTTOM, TOP, log=True)
    parts = [*_frame(across, up, across_name), *_legend(drawn)]
    parts += [_marker(across, marker) for marker in markers if across.low <= marker.step <= across.high]
    parts += [_line(one, across, up, across_name) for one in drawn]
    return _figure(f"{title} (logarithmic)", WIDTH, HEIGHT, parts)


def stacked_bars(title: str, bars: Mapping[str, Mapping[str, float]], unit: str) -> Markup:
    """Return horizontal bars, each made of named parts; an empty string if there is nothing to draw."""
    totals = {name: sum(parts.values()) for name, parts in bars.items()}
    if not totals or max(totals.values()) <= 0:
        return Markup()
    width, left, high, gap = 1140, 120, 30, 16
    height = 16 + len(bars) * (high + gap) + 34
    across = axis_over([0.0, *totals.values()], left, width - 90)
    names = list(dict.fromkeys(name for parts in bars.values() for name in parts))
    out = []
    bottom = height - 30
    for tick in across.ticks(8):
        x = across.place(tick)
        out.append(_svg("line", x1=x, x2=x, y1=6, y2=bottom, class_="grid"))
        out.append(_text(x, bottom + 18, tick_text(tick), "middle"))
    for row, (name, parts) in enumerate(bars.items()):
        top = 12 + row * (high + gap)
        out.append(_text(left - 10, top + high / 2 + 4, name, "end", "name"))
        reached = 0.0
        for part, value in parts.items():
            start, end = across.place(reached), across.place(reached + value)
            tip = Markup("<title>{}</title>").format(f"{part}: {value:.2f} {unit}")
            colour = f"fill c{names.index(part) % 10}" if len(parts) > 1 else "fill whole"
            wide = max(0.0, end - start)
            out.append(_svg("rect", tip, x=start, y=top, width=wide, height=high, class_=colour))
            reached += value
        out.append(
            _text(across.place(reached) + 8, top + high / 2 + 4, f"{reached:.2f} {unit}", "start", "name")
        )
    return _figure(title, width, height, out)


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Return the mean of each point's neighbourhood.

    It reaches as far to the left as to the right, so that a falling loss isn't shown too high; at the end, where losses
    are flat, to the left alone.
    """
    reach = max(1, round(len(points) * WINDOW_SHARE / 2))
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    out = []
    for index, (x, _) in enumerate(points):
        left = min(reach, index)
        right = min(left, len(points) - 1 - index)
        out.append((x, (sums[index + right + 1] - sums[index - left]) / (left + right + 1)))
    return out


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> Sequence[Point]:
    """Return at most about ``most`` points: of each stretch its lowest and highest, so that no spike is lost."""
    if len(points) <= most:
        return points
    size = math.ceil(len(points) / (most // 2 - 1))
    out = [points[0]]
    for start in range(1, len(points) - 1, size):
        stretch = points[start : min(start + size, len(points) - 1)]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        out += sorted(ends)
    return [*out, points[-1]]


def _frame(across: Axis, up: Axis, across_name: str = "step") -> Iterable[Markup]:
    bottom = HEIGHT - BOTTOM
    for tick in up.ticks(5):
        y = up.place(tick)
        yield _svg("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid")
        yield _text(LEFT - 8, y + 4, tick_text(tick), "end")
    for tick in across.ticks(6):
        if across.log or tick == int(tick):
            yield _text(across.place(tick), bottom + 17, tick_text(tick), "middle")
    yield _svg("line", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom, class_="axis")
    yield _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, across_name, "middle")


def _legend(series: Sequence[Series]) -> Iterable[Markup]:
    if len(series) < 2:
        return
    x = LEFT
    for one in series:
        faint = " faint" if one.faint else ""
        yield _svg("line", x1=x, x2=x + 18, y1=14, y2=14, class_=f"line c{one.colour % 10}{faint}")
        yield _text(x + 23, 18, one.name, "start")
        x += 36 + round(6.6 * len(one.name))


def _marker(across: Axis, marker: Marker) -> Markup:
    x = across.place(marker.step)
    tip = Markup("<title>{}</title>").format(marker.label)
    drawn = _svg("line", tip, x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM, class_="marker")
    if not marker.written:
        return drawn
    right = x > (across.start + across.end) / 2
    return drawn + _text(x - 4 if right else x + 4, TOP + 10, marker.written, "end" if right else "start")


def _line(series: Series, across: Axis, up: Axis, across_name: str = "step") -> Markup:
    points = [(across.place(x), up.place(y)) for x, y in thinned(series.points)]
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for x, y in points[1:]:
        path += f"H{x:.1f}V{y:.1f}" if series.stairs else f"L{x:.1f} {y:.1f}"
    if series.stairs:
        path += f"H{across.end:.1f}"
    faint = " faint" if series.faint else ""
    drawn = _svg("path", d=path, class_=f"line c{series.colour % 10}{faint}")
    if len(series.points) > MOST_MARKS or not (series.marks or len(series.points) == 1):
        return drawn
    marks = Markup()
    for (x, y), (step, value) in zip(points, series.points, strict=True):
        tip = Markup("<title>{}</title>").format(f"{series.name} at {across_name} {step:g}: {value:.5g}")
        marks += _svg("circle", tip, cx=x, cy=y, r=3, class_=f"fill c{series.colour % 10}")
    return drawn + marks


def _figure(title: str, width: float, height: float, parts: Iterable[Markup]) -> Markup:
    svg = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        width, height, title, Markup().join(parts)
    )
    return Markup("<figure><figcaption>{}</figcaption>{}</figure>").format(title, svg)


def _text(x: float, y: float, text: str, anchor: str, class_: str = "tick") -> Markup:
    return _svg("text", escape(text), x=x, y=y, text_anchor=anchor, class_=class_)


def _svg(tag: str, inner: Markup = NOTHING, **attributes: str | float) -> Markup:
    """Return one element. `class_` and `text_anchor` are written as SVG names them."""
    written = Markup()
    for name, value in attributes.items():
        text = f"{value:.1f}" if isinstance(value, float) else str(value)
        written += Markup(' {}="{}"').format(name.rstrip("_").replace("_", "-"), text)
    return Markup("<{}{}>{}</{}>").format(tag, written, inner, tag)
