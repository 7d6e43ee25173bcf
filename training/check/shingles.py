"""MinHash over character 4-grams, a block of rows at a time in numpy: rows that share text get keys that collide.

Source: Broder, "On the resemblance and containment of documents" (1997); bands as in Leskovec, Rajaraman and Ullman,
"Mining of Massive Datasets", section 3.4. Characters rather than words, so that it works for languages that put no
space between words, and so that short rows have enough shingles.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WIDTH = 4
BANDS, ROWS_PER_BAND = 10, 3
HASHES = BANDS * ROWS_PER_BAND
"""Rows whose shingles overlap by a share s (Jaccard) meet in a band with 1 − (1 − s³)¹⁰: 0.91 at 0.6, 1.00 at 0.8.
There are two such sets of bands, over all shingles and over those that few rows have: the first finds copies among
rows made of common phrases, the second copies among rows that share an instruction or a template."""
TABLE_BITS = 22
FEWEST_RARE = 12
"""A row with fewer shingles of its own is compared by all of them, both times."""

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]
I64 = NDArray[np.int64]

_MULTIPLIERS = np.random.default_rng(20).integers(1, 2**32, size=HASHES, dtype=np.uint32) | np.uint32(1)


def _mixed(h: U32) -> U32:
    """Spread the bits of 32-bit numbers (the finaliser of MurmurHash3)."""
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def code_points(texts: Sequence[str]) -> tuple[U32, I64]:
    """Return all texts' characters in one array and where each text begins, with the end as a last entry."""
    lengths = np.fromiter((len(text) for text in texts), dtype=np.int64, count=len(texts))
    starts = np.concatenate(([0], np.cumsum(lengths)))
    joined = "".join(texts).encode("utf-32-le", "surrogatepass")
    return np.frombuffer(joined, dtype=np.uint32), starts


def windows(characters: U32, starts: I64, width: int) -> tuple[U32, I64, I64]:
    """Hash every window of `width` characters that lies in one text.

    Returns the hashes [W], the position of each in `characters` [W], and the bounds of each text in them [texts + 1].
    """
    total = max(len(characters) - width + 1, 0)
    hashes = np.zeros(total, dtype=np.uint32)
    for offset in range(width):
        hashes = hashes * np.uint32(0x9E3779B1) + characters[offset : offset + total]
    inside = np.ones(total, dtype=bool)
    for back in range(1, width):
        crossing = starts[1:-1] - back
        inside[crossing[(crossing >= 0) & (crossing < total)]] = False
    lengths = np.diff(starts)
    counts = np.maximum(lengths - width + 1, 0)
    positions = np.flatnonzero(inside)
    return _mixed(hashes[positions]), positions, np.concatenate(([0], np.cumsum(counts)))


@dataclass(frozen=True, slots=True)
class Boilerplate:
    """Shingles that so many rows have that they say nothing: an instruction, a template, a turn of phrase."""

    common: U8
    """[2 ** TABLE_BITS] 1 where a shingle's top bits fall on a common one."""

    @classmethod
    def learn(cls, texts: Sequence[str], share: float = 0.02, fewest: int = 30) -> "Boilerplate":
        """Find the shingles that more than `share` of the texts have, and at least `fewest` of them."""
        seen = np.zeros(2**TABLE_BITS, dtype=np.uint32)
        for start in range(0, len(texts), 1000):
            hashes, _, bounds = windows(*code_points(texts[start : start + 1000]), WIDTH)
            rows = np.repeat(np.arange(len(bounds) - 1, dtype=np.uint64), np.diff(bounds))
            slots = (hashes >> np.uint32(32 - TABLE_BITS)).astype(np.uint64)
            keys = np.sort(rows << np.uint64(32) | slots)
            once_a_row = keys[np.diff(keys, prepend=~keys[:1]) != 0] & np.uint64(0xFFFFFFFF)
            np.add.at(seen, once_a_row.astype(np.int64), np.uint32(1))
        return cls((seen > max(share * len(texts), fewest)).astype(np.uint8))


@dataclass(frozen=True, slots=True)
class Signatures:
    """What is kept of each row's shingles: over all of them, then over the rare ones."""

    bands: U32
    """[rows, 2 · BANDS] keys; 0 where a row is too short to have any."""
    sketch: U8
    """[rows, 2 · HASHES] a byte of every minimum: the share of equal bytes in a half estimates the Jaccard overlap."""


def signatures(texts: Sequence[str], boilerplate: Boilerplate) -> Signatures:
    """Return the MinHash keys of each text."""
    hashes, _, bounds = windows(*code_points(texts), WIDTH)
    everything = _minima(hashes, bounds)
    rare = _minima(*_without_boilerplate(hashes, bounds, boilerplate))
    return Signatures(
        np.concatenate((everything.bands, rare.bands), axis=1),
        np.concatenate((everything.sketch, rare.sketch), axis=1),
    )


def _minima(hashes: U32, bounds: I64) -> Signatures:
    rows = len(bounds) - 1
    bands = np.zeros((rows, BANDS), dtype=np.uint32)
    sketch = np.zeros((rows, HASHES), dtype=np.uint8)
    filled = np.flatnonzero(np.diff(bounds) > 0)
    if len(filled) == 0:
        return Signatures(bands, sketch)
    starts = bounds[filled]
    for index, multiplier in enumerate(_MULTIPLIERS):
        least = _mixed(np.minimum.reduceat(hashes * multiplier, starts))
        sketch[filled, index] = least >> np.uint32(24)
        band = index // ROWS_PER_BAND
        bands[filled, band] = _mixed(bands[filled, band] * np.uint32(31) + least + np.uint32(band + 1))
    return Signatures(bands, sketch)


def _without_boilerplate(hashes: U32, bounds: I64, boilerplate: Boilerplate) -> tuple[U32, I64]:
    """Drop common shingles from the rows that have enough others."""
    counts = np.diff(bounds)
    rows = np.repeat(np.arange(len(counts)), counts)
    rare = boilerplate.common[hashes >> np.uint32(32 - TABLE_BITS)] == 0
    rare_counts = np.bincount(rows[rare], minlength=len(counts))
    keep = rare | (rare_counts < FEWEST_RARE)[rows]
    kept = np.bincount(rows[keep], minlength=len(counts))
    return hashes[keep], np.concatenate(([0], np.cumsum(kept)))
