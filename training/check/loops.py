"""Answers that say the same over and over, a block of rows at a time.

A loop shows as many windows of a few characters that were last seen the same distance before, and a stretch of text
that equals what stands that distance before it.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from manylora.training.check.shingles import I64, U32, code_points, windows

WIDTH = 6
LEAST_COVERED = 36
"""Characters a loop must cover: three "ha ha" are style."""
SHARE_SEEN_BEFORE = 0.8
"""Of a longer text, windows that came before in it, at any distance: loops with a counter in them."""
LONG = 300


def looping(answers: Sequence[str]) -> NDArray[np.bool_]:
    """Say for each answer whether it loops. Rules of dashes, padding and columns of numbers don't count."""
    characters, starts = code_points(answers)
    hashes, positions, bounds = windows(characters, starts, WIDTH)
    counts = np.diff(bounds)
    rows = np.repeat(np.arange(len(counts)), counts)
    distance = _distance_to_last(hashes, positions, rows)
    found = _periodic(distance, rows, characters, starts)
    before = np.bincount(rows[distance > 0], minlength=len(answers))
    written = _letters(characters)
    letters = np.add.reduceat(np.append(written, 0), starts[:-1]) if len(answers) else np.zeros(0)
    mostly_letters = letters > 0.5 * np.diff(starts)
    found |= (counts >= LONG) & (before > SHARE_SEEN_BEFORE * counts) & mostly_letters
    return found


def _letters(characters: U32) -> NDArray[np.int64]:
    """1 for letters, roughly: ASCII letters and all beyond Latin-1's signs."""
    lower = characters | np.uint32(0x20)
    return (((lower >= 97) & (lower <= 122)) | (characters >= 0xC0)).astype(np.int64)


def _distance_to_last(hashes: U32, positions: I64, rows: I64) -> I64:
    """How far back the same window was last seen in the same row; 0 where it is new."""
    key = rows.astype(np.uint64) << np.uint64(32) | hashes
    order = np.argsort(key, kind="stable")
    same = np.zeros(len(key), dtype=bool)
    same[1:] = key[order[1:]] == key[order[:-1]]
    distance = np.zeros(len(key), dtype=np.int64)
    later = order[same]
    earlier = order[np.flatnonzero(same) - 1]
    distance[later] = positions[later] - positions[earlier]
    return distance


def _periodic(distance: I64, rows: I64, characters: U32, starts: I64) -> NDArray[np.bool_]:
    """Rows with a stretch that equals the text one period before it, for long enough.

    The period is each row's most frequent distance: a window that comes twice in a period has others as well.
    """
    count = len(starts) - 1
    found = np.zeros(count, dtype=bool)
    period = _commonest_distance(distance, rows, count)
    lengths = np.diff(starts)
    row_of = np.repeat(np.arange(count), lengths)
    place = np.arange(len(characters))
    shift = period[row_of]
    comparable = (shift > 0) & (place - shift >= starts[:-1][row_of])
    same = np.zeros(len(characters) + 1, dtype=bool)
    same[:-1][comparable] = characters[place[comparable]] == characters[(place - shift)[comparable]]
    # A stretch begins where `same` turns on and ends where it turns off; `comparable` is off where a row begins.
    turns = np.flatnonzero(np.diff(np.concatenate(([False], same)).astype(np.int8)))
    begins, ends = turns[::2], turns[1::2]
    of = row_of[begins]
    covered = ends - begins + period[of]
    needed = np.select([period[of] >= 24, period[of] >= 10], [2.8, 3.8], 5.8)
    loops = (covered >= needed * period[of]) & (covered >= LEAST_COVERED)
    sums = np.concatenate(([0], np.cumsum(_letters(characters))))
    in_period = sums[begins] - sums[begins - period[of]]
    found[of[loops & (in_period >= np.maximum(0.3 * period[of], 1))]] = True
    return found


def _commonest_distance(distance: I64, rows: I64, count: int) -> I64:
    """Each row's most frequent distance between two equal windows; 0 for a row without."""
    repeated = distance > 0
    keys = np.sort(rows[repeated] << 32 | distance[repeated])
    firsts = np.flatnonzero(np.diff(keys, prepend=-1))
    pairs, times = keys[firsts], np.diff(firsts, append=len(keys))
    order = np.argsort(times, kind="stable")
    commonest = np.zeros(count, dtype=np.int64)
    commonest[pairs[order] >> 32] = pairs[order] & 0xFFFFFFFF
    return commonest
