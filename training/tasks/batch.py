"""Rows of several tasks as one sequence of tokens without padding, with what each token belongs to.

Tasks stand one after the other, so each owns one span of tokens. Documents meet again in attention alone, on grids:
a document a line, those of similar length together, padded on the right (attention.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise

import torch
from torch import Tensor

IGNORED = -100
"""The label of a token that isn't trained."""
WORTH_A_GRID = 1 << 15
"""So many scores of padding, at least, another grid must save: about what its own operations cost."""

Span = tuple[int, int]
"""The first, and the one after the last."""
Row = Mapping[str, list[int]]
"""``input_ids``, ``labels`` (not shifted) and, where several documents were packed, ``position_ids``."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Some of a batch's documents, each a line of ``length`` cells; t tokens in all."""

    tokens: Tensor
    """[t] int64: where in the batch's sequence each token stands."""
    cells: Tensor
    """[t] int64: its cell, counted line by line."""
    documents: int
    length: int

    def to(self, device: torch.device) -> "Grid":
        """Return the grid on ``device``."""
        return replace(self, tokens=self.tokens.to(device), cells=self.cells.to(device))


@dataclass(frozen=True, slots=True)
class MixedBatch:
    """T tokens, N of them followed by a trained one."""

    input_ids: Tensor
    """[1, T] int64."""
    position_ids: Tensor
    """[1, T] int64, from 0 in every document."""
    grids: tuple[Grid, ...]
    """Where every token stands in attention."""
    predicting: Tensor
    """[N] int64: the tokens whose next one is trained."""
    targets: Tensor
    """[N] int64: those next ones."""
    spans: tuple[Span, ...]
    """Each task's tokens; empty where it has no rows in this batch."""
    trained_spans: tuple[Span, ...]
    """Each task's part of ``predicting`` and ``targets``."""
    row_tokens: tuple[tuple[int, ...], ...]
    """How many of these each of a task's rows has."""

    def to(self, device: torch.device) -> "MixedBatch":
        """Return the batch on ``device``."""
        names = ("input_ids", "position_ids", "predicting", "targets")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, grids=tuple(grid.to(device) for grid in self.grids), **moved)


def trained_tokens(row: Row) -> int:
    """Return how many tokens of ``row`` are trained. A document's first has nothing to be predicted from."""
    return sum(label != IGNORED for start, end in _documents(row) for label in row["labels"][start + 1 : end])


def mix(rows_by_task: Sequence[Sequence[Row]]) -> MixedBatch:
    """Put the rows of all tasks into one batch. At least one task has a row."""
    tokens: list[int] = []
    documents: list[Span] = []
    predicting: list[int] = []
    targets: list[int] = []
    borders, trained_borders = [0], [0]
    row_tokens: list[tuple[int, ...]] = []
    for rows in rows_by_task:
        counts: list[int] = []
        for row in rows:
            first, before = len(tokens), len(targets)
            tokens += row["input_ids"]
            for start, end in _documents(row):
                documents.append((first + start, first + end))
                for at in range(start + 1, end):
                    if row["labels"][at] != IGNORED:
                        predicting.append(first + at - 1)
                        targets.append(row["labels"][at])
            counts.append(len(targets) - before)
        row_tokens.append(tuple(counts))
        borders.append(len(tokens))
        trained_borders.append(len(targets))
    positions = chain.from_iterable(range(end - start) for start, end in documents)
    return MixedBatch(
        input_ids=torch.tensor([tokens]),
        position_ids=torch.tensor([list(positions)]),
        grids=tuple(_grid(group) for group in _by_length(sorted(documents, key=_length, reverse=True))),
        predicting=torch.tensor(predicting, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        spans=tuple(pairwise(borders)),
        trained_spans=tuple(pairwise(trained_borders)),
        row_tokens=tuple(row_tokens),
    )


def _documents(row: Row) -> list[Span]:
    """Return where each document of a row begins and ends: a packed row's positions restart with each."""
    length = len(row["input_ids"])
    if "position_ids" not in row:
        return [(0, length)]
    starts = [at for at, position in enumerate(row["position_ids"]) if position == 0]
    return list(pairwise([*starts, length]))


def _length(document: Span) -> int:
    return document[1] - document[0]


def _by_length(documents: list[Span]) -> list[list[Span]]:
    """Part documents, the longest first, where that saves the most padding, again and again while it is worth it."""
    longest = _length(documents[0])
    saved, at = max(
        ((len(documents) - at) * (longest**2 - _length(document) ** 2), at)
        for at, document in enumerate(documents)
    )
    if saved < WORTH_A_GRID:
        return [documents]
    return [*_by_length(documents[:at]), *_by_length(documents[at:])]


def _grid(documents: list[Span]) -> Grid:
    length = _length(documents[0])
    tokens = chain.from_iterable(range(start, end) for start, end in documents)
    cells = chain.from_iterable(
        range(line * length, line * length + _length(document)) for line, document in enumerate(documents)
    )
    return Grid(torch.tensor(list(tokens)), torch.tensor(list(cells)), len(documents), length)
