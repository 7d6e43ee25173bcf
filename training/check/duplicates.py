"""Rows judged together: copies, near copies, prompts with several answers, and what train and eval have in common."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from manylora.training.check.kinds import Flag
from manylora.training.check.shared import Shared
from manylora.training.check.shingles import BANDS, HASHES
from manylora.training.check.similar import Likeness, Sides, compare
from manylora.training.check.table import RowTable

I64 = NDArray[np.int64]
Bool = NDArray[np.bool_]

LIKELY, LIKELY_OF_ALL, LIKELY_OF_RARE = 0.7, 0.4, 0.2
"""Of a sketch's bytes over all shingles and over rare ones, the shares that must be equal for a pair to be read: rows
made by one template share many of all and hardly any of the rare ones. From LIKELY on, those over all are enough."""
SIZE_ALIKE = 0.65
"""Copies differ less in length than this, doubled spaces included."""
TRIES = 5
"""Pairs that are read for one row, the likeliest first."""
PAIRS_AT_ONCE = 200_000
PAIRS_WORTH_A_PROCESS = 50_000
COPIES_OF_COPIES = 3
_FLAGS = {Likeness.SAME: Flag.NEAR_DUPLICATE | Flag.SAME_IN_EFFECT, Likeness.NEAR: Flag.NEAR_DUPLICATE}


def judge_together(table: RowTable, evaluates: Bool, shared: Shared, processes: int = 1) -> None:
    """Set the flags that need more than one row.

    `evaluates` [rows] says which rows are evaluation data, `shared` what many rows say alike.
    """
    usable = (table.column("flags")[:] & Flag.BROKEN) == 0
    _mark_exact(table, usable & ~evaluates)
    _mark_same_words(table, usable & ~evaluates)
    if evaluates.any():
        _mark_known(table, usable, evaluates)
    _mark_near(table, usable, evaluates, shared, processes)
    _mark_inconsistent(table, usable & ~evaluates)


def _groups(keys: NDArray[np.uint64], rows: I64) -> tuple[I64, I64]:
    """Sort rows by key; returns them, and for each the first row of its group (rows keep their order in a group)."""
    order = np.argsort(keys, kind="stable")
    ordered, sorted_keys = rows[order], keys[order]
    begins = np.ones(len(ordered), dtype=bool)
    begins[1:] = sorted_keys[1:] != sorted_keys[:-1]
    leader = np.maximum.accumulate(np.where(begins, np.arange(len(ordered)), 0))
    return ordered, ordered[leader]


def _mark(table: RowTable, rows: I64, like: I64, flag: Flag) -> None:
    table.column("flags")[rows] |= np.uint32(flag)
    table.column("like")[rows] = like


def _mark_exact(table: RowTable, rows_used: Bool) -> None:
    rows = np.flatnonzero(rows_used)
    ordered, first = _groups(np.asarray(table.column("row")[rows]), rows)
    copies = ordered != first
    _mark(table, ordered[copies], first[copies], Flag.EXACT_DUPLICATE)


def _mark_same_words(table: RowTable, rows_used: Bool) -> None:
    """Rows that differ in case, space and punctuation alone."""
    rows = np.flatnonzero(rows_used & ((table.column("flags")[:] & Flag.EXACT_DUPLICATE) == 0))
    ordered, first = _groups(np.asarray(table.column("loose")[rows]), rows)
    copies = ordered != first
    _mark(table, ordered[copies], first[copies], _FLAGS[Likeness.SAME])


def _mark_inconsistent(table: RowTable, rows_used: Bool) -> None:
    """Rows whose prompt has more than one answer in the data set."""
    prompts, flags = table.column("prompt"), table.column("flags")
    answers = _answers_in_effect(table)
    rows = np.flatnonzero(rows_used & (prompts[:] != 0))
    if len(rows) < 2:
        return
    rows = rows[np.lexsort((answers[rows], prompts[rows]))]
    prompt, answer = np.asarray(prompts[rows]), answers[rows]
    same_prompt = prompt[1:] == prompt[:-1]
    same_answer = same_prompt & (answer[1:] == answer[:-1])
    differs = np.flatnonzero(same_prompt & ~same_answer)
    torn = np.isin(prompt, prompt[differs])
    flags[rows[torn]] |= np.uint32(Flag.INCONSISTENT)
    usual = torn & (2 * _group_sizes(same_answer) > _group_sizes(same_prompt))
    flags[rows[usual]] |= np.uint32(Flag.USUAL_ANSWER)
    against = table.column("against")
    against[rows[differs + 1]] = rows[differs]
    against[rows[differs]] = rows[differs + 1]


def _answers_in_effect(table: RowTable) -> NDArray[np.uint64]:
    """The rows' answers as hashes, where copies with edits that change nothing have that of what they copy."""
    answers = np.array(table.column("answer"))
    like = table.column("like")
    copies = np.flatnonzero((table.column("flags")[:] & Flag.SAME_IN_EFFECT) != 0)
    for _ in range(COPIES_OF_COPIES):
        answers[copies] = answers[like[copies]]
    return answers


def _group_sizes(same_as_before: Bool) -> I64:
    """For rows of which each but the first says whether it belongs to the one before: the size of each row's group."""
    number = np.concatenate(([0], np.cumsum(~same_as_before)))
    return np.bincount(number)[number]


def _mark_known(table: RowTable, usable: Bool, evaluates: Bool) -> None:
    """Training rows whose words, or whose prompt, are in the evaluation data."""
    flags, like = table.column("flags"), table.column("like")
    train, held_out = np.flatnonzero(usable & ~evaluates), np.flatnonzero(usable & evaluates)
    for name in ("prompt", "loose"):
        keys = table.column(name)
        known, at = np.unique(np.asarray(keys[held_out]), return_index=True)
        mine = np.asarray(keys[train])
        place = np.minimum(np.searchsorted(known, mine), len(known) - 1)
        hit = (known[place] == mine) & (mine != 0)
        flags[train[hit]] |= np.uint32(Flag.OVERLAP)
        like[train[hit]] = held_out[at[place[hit]]]


def _mark_near(table: RowTable, usable: Bool, evaluates: Bool, shared: Shared, processes: int) -> None:
    flags = np.asarray(table.column("flags"))
    copies = (flags & (Flag.EXACT_DUPLICATE | Flag.NEAR_DUPLICATE)) != 0
    pairs = _candidates(table, np.flatnonzero(usable & ~copies), evaluates)
    confirmed = _confirm_together(table, pairs, shared, processes)
    for earlier, later, likeness in confirmed:
        held_out = evaluates[earlier], evaluates[later]
        if held_out == (False, False):
            _mark(table, np.array([later]), np.array([earlier]), _FLAGS[likeness])
        elif held_out == (False, True):  # evaluation files come last
            _mark(table, np.array([earlier]), np.array([later]), Flag.OVERLAP)


def _candidates(table: RowTable, rows: I64, evaluates: Bool) -> I64:
    """Pairs [pairs, 2] of rows that share a band and whose sketches are alike, earlier row first.

    Of a later row there are TRIES at most, the likeliest first; later rows are in order.
    """
    bands, sketch, sizes = table.column("bands"), table.column("sketch"), np.asarray(table.column("size"))
    pairs, alike = np.zeros((0, 2), dtype=np.int64), np.zeros(0, dtype=np.float32)
    for band in range(2 * BANDS):
        keys = np.asarray(bands[rows, band])
        short = keys == 0
        ordered, first = _groups(keys[~short].astype(np.uint64), rows[~short])
        position = np.arange(len(ordered))
        begins = np.maximum.accumulate(np.where(ordered == first, position, 0))
        for partner in (begins, position - 1, position - 2):
            linked = (partner >= begins) & (partner < position)
            met = np.stack((ordered[partner[linked]], ordered[linked]), axis=1)
            shorter, longer = np.sort(sizes[met], axis=1).T
            met = met[(shorter >= SIZE_ALIKE * longer) & ~evaluates[met].all(axis=1)]
            estimate = _alike(sketch, met)
            likely = estimate > 0
            pairs, alike = np.concatenate((pairs, met[likely])), np.concatenate((alike, estimate[likely]))
        pairs, alike = _likeliest(pairs, alike)
    return pairs


def _likeliest(pairs: I64, alike: NDArray[np.float32]) -> tuple[I64, NDArray[np.float32]]:
    """Drop pairs that are there twice, and of each later row all but the TRIES likeliest."""
    order = np.lexsort((pairs[:, 0], -alike, pairs[:, 1]))
    pairs, alike = pairs[order], alike[order]
    new = np.ones(len(pairs), dtype=bool)
    new[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    pairs, alike = pairs[new], alike[new]
    place = np.arange(len(pairs))
    begins = np.ones(len(pairs), dtype=bool)
    begins[1:] = pairs[1:, 1] != pairs[:-1, 1]
    kept = place - np.maximum.accumulate(np.where(begins, place, 0)) < TRIES
    return pairs[kept], alike[kept]


def _alike(sketch: NDArray[np.uint8], pairs: I64) -> NDArray[np.float32]:
    """Estimate each pair's overlap: the mean of that over all shingles and over rare ones; 0 for unlikely pairs."""
    parts = []
    for part in np.array_split(pairs, len(pairs) // PAIRS_AT_ONCE + 1):
        same = sketch[part[:, 0]] == sketch[part[:, 1]]
        halves = same.reshape(len(part), 2, HASHES).mean(axis=2, dtype=np.float32)
        likely = (halves[:, 0] >= LIKELY_OF_ALL) & (halves[:, 1] >= LIKELY_OF_RARE) | (halves[:, 0] >= LIKELY)
        parts.append(np.where(likely, halves.mean(axis=1), 0))
    return np.concatenate(parts)


def _confirm_together(
    table: RowTable, pairs: I64, shared: Shared, processes: int
) -> list[tuple[int, int, Likeness]]:
    """Share the pairs out among processes where there are many; a later row's pairs stay together."""
    processes = min(processes, max(1, len(pairs) // PAIRS_WORTH_A_PROCESS))
    if processes == 1:
        return _confirm(table, pairs, shared)
    shares = [pairs[pairs[:, 1] % processes == share] for share in range(processes)]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        done = [pool.submit(_confirm_share, table.directory, table.rows, share, shared) for share in shares]
        return [pair for one in done for pair in one.result()]


def _confirm_share(directory: Path, rows: int, pairs: I64, shared: Shared) -> list[tuple[int, int, Likeness]]:
    table = RowTable(directory, rows)
    confirmed = _confirm(table, pairs, shared)
    table.close()
    return confirmed


def _confirm(table: RowTable, pairs: I64, shared: Shared) -> list[tuple[int, int, Likeness]]:
    """Read both rows of each later row's pairs until one is confirmed."""
    confirmed: list[tuple[int, int, Likeness]] = []
    sides = lru_cache(maxsize=2000)(partial(_sides, table, shared))
    done = -1
    for earlier, later in pairs.tolist():
        if later == done:
            continue
        likeness = compare(sides(earlier), sides(later))
        if likeness is not Likeness.OTHER:
            confirmed.append((earlier, later, likeness))
            done = later
    return confirmed


def _sides(table: RowTable, shared: Shared, row: int) -> Sides:
    text = table.text(row)
    return Sides.of(text.prompt, text.answer, shared)
