"""Log probabilities of a prompt's tokens, kept as arrays. Imports no torch.

A client may ask for half a million of them: as objects they would take ten times the memory, and each full round of the
garbage collector would stop every thread for as long as it takes to look at them all.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeAlias, overload

import numpy as np

from manylora.server.engine.request import TokenLogprobs

Floats: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.float64]]"
Integers: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.int64]]"


@dataclass(frozen=True, slots=True, eq=False)
class LogprobRows:
    """What a step tells about n tokens."""

    token_ids: Integers
    """[n]."""
    logprobs: Floats
    """[n]."""
    top_ids: Integers
    """[n, k], best first."""
    top_logprobs: Floats
    """[n, k]."""

    def __len__(self) -> int:
        """Return n."""
        return len(self.token_ids)

    def tokens(self, first: int = 0, last: int | None = None) -> Iterator[TokenLogprobs]:
        """Yield rows [first, last) as objects."""
        rows = slice(first, last)
        columns = (self.token_ids, self.logprobs, self.top_ids, self.top_logprobs)
        for token_id, logprob, ids, values in zip(*(each[rows].tolist() for each in columns), strict=True):
            yield TokenLogprobs(token_id, logprob, tuple(zip(ids, values, strict=True)))


NO_ROWS = LogprobRows(np.empty(0, np.int64), np.empty(0), np.empty((0, 0), np.int64), np.empty((0, 0)))


class PromptLogprobs(Sequence[TokenLogprobs | None]):
    """Those of a whole prompt, as they are told chunk by chunk; None for its first token, which nothing predicts."""

    def __init__(self) -> None:
        self._parts: list[LogprobRows] = []
        self._ends = [1]
        """How many tokens there are with the first, with each part."""

    def add(self, rows: LogprobRows) -> None:
        """Append what a chunk told."""
        if len(rows):
            self._parts.append(rows)
            self._ends.append(self._ends[-1] + len(rows))

    def __len__(self) -> int:
        """Return the number of tokens, the first one included."""
        return self._ends[-1]

    def __iter__(self) -> Iterator[TokenLogprobs | None]:
        """Yield the tokens in order; the objects are made as they are asked for."""
        yield None
        yield from chain.from_iterable(part.tokens() for part in self._parts)

    @overload
    def __getitem__(self, place: int) -> TokenLogprobs | None: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[TokenLogprobs | None]: ...

    def __getitem__(self, place: int | slice) -> TokenLogprobs | Sequence[TokenLogprobs | None] | None:
        """Return one token's, or those of a slice."""
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        if place == 0:
            return None
        part = bisect_right(self._ends, place) - 1
        row = place - self._ends[part]
        return next(self._parts[part].tokens(row, row + 1))
