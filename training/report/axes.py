"""Axes of a plot: round tick values, their text, and where a value lies."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

LOG_FROM_RATIO = 50.0
"""Greatest over least value from which an axis of positive values is logarithmic."""

FEWEST_TICKS = 3
"""Of a logarithmic axis at 1, 2 and 5; within less than a decade evenly spaced values say more."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A range of values drawn between two places, in pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """Return where a value lies."""
        low, high, at = (_log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, about: int) -> list[float]:
        """Return round values inside the range, about so many."""
        if self.log and len(found := _log_ticks(self.low, self.high, about)) >= FEWEST_TICKS:
            return found
        step = round_step((self.high - self.low) / max(1, about))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [index * step for index in range(first, last + 1)]


def axis_over(values: Sequence[float], start: float, end: float, *, may_be_log: bool = False) -> Axis:
    """Return an axis that holds all values with a little room; from zero where they are near it."""
    low, high = min(values), max(values)
    if may_be_log and low > 0 and high / low >= LOG_FROM_RATIO:
        return Axis(low / 1.2, high * 1.2, start, end, log=True)
    if high == low:
        room = abs(high) / 2 or 0.5
        return Axis(min(low - room, 0.0) if low >= 0 else low - room, high + room, start, end)
    room = (high - low) * 0.06
    bottom = 0.0 if 0 <= low <= (high - low) * 0.5 else low - room
    return Axis(bottom, high + room, start, end)


def round_step(step: float) -> float:
    """Return the next 1, 2 or 5 times a power of ten that is not less than ``step``."""
    power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def tick_text(value: float) -> str:
    """Return a tick's value, short: 0.25, 1,500, 2e-04."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e7:
        return f"{value:.0e}" if f"{value:.0e}" == f"{value:.1e}".replace(".0e", "e") else f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{round(value, 6):g}"


def _log_ticks(low: float, high: float, about: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**decade for decade in decades for factor in factors]
        inside = [value for value in found if low <= value <= high]
        if len(inside) <= about + 2:
            return inside
    stride = -(-len(inside) // about)
    return inside[::stride]


def _log(value: float) -> float:
    return math.log10(value)
