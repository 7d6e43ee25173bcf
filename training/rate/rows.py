"""Parts of a data set, without a copy."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Part:
    """Some neighbouring rows of a map-style data set."""

    whole: Any
    rows: range

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.whole[self.rows[index]]


def first(whole: Any, count: int) -> Any:
    """Return the first ``count`` rows, or all if there are fewer."""
    return whole if len(whole) <= count else Part(whole, range(count))


def split_end(whole: Any, count: int) -> tuple[Part, Part]:
    """Return all rows but the last ``count``, and those."""
    border = len(whole) - count
    return Part(whole, range(border)), Part(whole, range(border, len(whole)))
