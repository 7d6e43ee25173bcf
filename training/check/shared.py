"""What many rows of a data set say word for word: an instruction, a template. It doesn't make two rows the same."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np

from manylora.training.check.texts import RowText

_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\d+|[^\W\d_\u3040-\u30ff\u3400-\u9fff]+")
"""Words, numbers, and single characters of the scripts that put no space between words."""
RUN = 4
"""Words in a run. Shorter ones are turns of phrase."""
SHARE = 0.02
SHARE_OF_FEW, ENOUGH = 0.05, 30
"""A run is shared by more than SHARE of the rows, and by more than ENOUGH of them or, if those are too many for a small
data set, by more than SHARE_OF_FEW."""
LEAST = 4
"""So many rows may be copies of each other in any data set."""
LOOKED_AT = 400
"""Words at each end of a prompt or answer in which instructions are looked for."""


def words_of(text: str) -> list[str]:
    """Split a text into small-letter words and numbers."""
    return _WORDS.findall(text.casefold())


@dataclass(frozen=True, slots=True)
class Shared:
    """The runs of words that many rows have, as hashes."""

    runs: frozenset[int] = frozenset()

    @classmethod
    def learn(cls, rows: Sequence[RowText]) -> "Shared":
        """Count in how many rows each run is."""
        hashes = [np.fromiter(_runs_of_row(row), dtype=np.uint32) for row in rows]
        if not hashes:
            return cls()
        runs, counts = np.unique(np.concatenate(hashes), return_counts=True)
        most = max(SHARE * len(rows), min(ENOUGH, SHARE_OF_FEW * len(rows)), LEAST)
        return cls(frozenset(runs[counts > most].tolist()))

    def covers(self, words: Sequence[str]) -> list[bool]:
        """Say of each word whether it is part of a shared run."""
        covered = [False] * len(words)
        if self.runs:
            for start, run in enumerate(_runs(words)):
                if run in self.runs:
                    covered[start : start + RUN] = [True] * RUN
        return covered


def _runs_of_row(row: RowText) -> Iterable[int]:
    found: set[int] = set()
    for text in (row.prompt, row.answer):
        words = words_of(text)
        if len(words) > 2 * LOOKED_AT:
            found.update(_runs(words[-LOOKED_AT:]))
            words = words[:LOOKED_AT]
        found.update(_runs(words))
    return found


def _runs(words: Sequence[str]) -> Iterable[int]:
    # Python's own hashes of strings differ from process to process.
    return (crc32(" ".join(words[at : at + RUN]).encode()) for at in range(len(words) - RUN + 1))
