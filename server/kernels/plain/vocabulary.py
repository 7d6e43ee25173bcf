"""Adapters' own vocabularies in a step, in torch, for every backend: what embedding and head say of rows that have one.

Such rows are few, so they are computed apart, an adapter after the other, and nobody else's numbers are touched. The
sum of a mixture is W + Σ wᵢ ΔWᵢ here as in every layer: a row that an adapter replaces changes by what it is other than
the base's. A row's bits don't depend on its company: products keep within the sizes of invariance.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from manylora.adapters.vocabulary import VOCABULARY, TokenDelta, TokenRows, VocabularyDelta
from manylora.server.kernels.plain.invariance import limits_on
from manylora.server.kernels.plain.lora import product
from manylora.server.kernels.step import Ints, StepBatch
from manylora.server.kernels.vocabularies import Vocabularies

Multiply: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Return x [n, hidden] times rows [m, hidden], transposed: float32 [n, m], whose rows' bits are each one's own."""
Parts: TypeAlias = tuple[tuple[VocabularyDelta, float], ...]
"""Vocabularies with their weights, in the order in which they are summed."""


@dataclass(frozen=True, slots=True)
class VocabularyUse:
    """Neighbouring tokens [first, last) of a step that read and are answered by the same vocabularies."""

    first: int
    last: int
    parts: Parts

    @property
    def replaces(self) -> bool:
        """Whether it is one adapter as it is, whose rows stand for themselves."""
        return len(self.parts) == 1 and self.parts[0][1] == 1.0


@dataclass(frozen=True, slots=True)
class StepVocabulary:
    """The tokens of a step that have vocabularies of their own; False: none has."""

    uses: tuple[VocabularyUse, ...] = ()
    size: int = 0
    """The base's ids."""

    def __bool__(self) -> bool:
        return bool(self.uses)

    @classmethod
    def of(cls, batch: StepBatch, held: Vocabularies, size: int) -> "StepVocabulary":
        """Find them."""
        adapters = batch.adapters
        if not adapters.have_vocabularies:
            return NO_VOCABULARY
        deltas = [held.of(each[VOCABULARY]) if VOCABULARY in each else None for each in adapters.ranges]
        uses: list[VocabularyUse] = []
        which, weights = adapters.which.tolist(), adapters.weights.tolist()
        starts = batch.attention.query_start.tolist()
        for (first, last), (one, other) in zip(
            pairwise(starts), pairwise(adapters.start.tolist()), strict=True
        ):
            found = [(deltas[which[i]], weights[i]) for i in range(one, other)]
            parts = tuple((delta, weight) for delta, weight in found if delta is not None)
            if uses and uses[-1].parts == parts and uses[-1].last == first:
                uses[-1] = VocabularyUse(uses[-1].first, last, parts)
            elif parts and last > first:
                uses.append(VocabularyUse(first, last, parts))
        return cls(tuple(uses), size)

    def base_ids(self, ids: Ints) -> Ints:
        """Return the ids with 0 for those that the base has no row of."""
        if not self.uses:
            return ids
        known = ids < self.size
        return ids if known.all() else (ids * known).astype(ids.dtype)

    def embed(self, ids: Ints, x: Tensor) -> None:
        """Give tokens their own embeddings: x [n, hidden] has the base's of ``base_ids``, and is changed in place."""
        for use in self.uses:
            own = torch.from_numpy(ids[use.first : use.last]).long()
            base = x[use.first : use.last].float()
            out = base.clone()
            for delta, weight in use.parts:
                _embed(delta.embedding, own, base, out, None if use.replaces else weight)
            x[use.first : use.last] = out.to(x.dtype)

    def answer(
        self, tokens: Ints, hidden: Tensor, logits: Tensor, multiply: Multiply | None = None
    ) -> Mapping[int, Tensor]:
        """Give tokens their own logits.

        ``hidden`` [m, hidden] are the normalised last states of ``tokens`` [n], n ≤ m, and ``logits`` float32 [n, size]
        the base's of them, which are changed in place where a vocabulary has as many ids. Returned are those of the
        others, float32 [ids], by place among the tokens. ``multiply``: by what; None: torch.
        """
        others: dict[int, Tensor] = {}
        for use in self.uses:
            places = [i for i, token in enumerate(tokens.tolist()) if use.first <= token < use.last]
            if not places:
                continue
            index = torch.tensor(places, device=logits.device)
            size = use.parts[0][0].size if use.replaces else self.size
            base = logits[index]
            out = _widened(base, size)
            states = hidden[index]
            for delta, weight in use.parts:
                own = _Head(delta.head, states, multiply or multiplied)
                own.add(base, out, None if use.replaces else weight)
            if size == self.size:
                logits[index] = out
            else:
                others.update(zip(places, out, strict=True))
        return others


NO_VOCABULARY = StepVocabulary()


def _embed(delta: TokenDelta, ids: Tensor, base: Tensor, out: Tensor, weight: float | None) -> None:
    """Add a change of the embedding to ``out`` float32 [n, hidden]; weight None: rows replace what is there."""
    if delta.rows is not None:
        places, rows = _found(delta.rows, ids, out.device)
        own = rows.float()
        out[places] = own if weight is None else out[places] + weight * (own - base[places])
    if delta.factors is not None:
        columns = ids.clamp(max=delta.factors.a.shape[1] - 1).to(out.device)
        shrunk = delta.factors.a[:, columns].T.float()
        if weight is not None:
            shrunk = shrunk * weight
        _add_in_pieces(out, shrunk, delta.factors.b.float())


def _found(rows: TokenRows, ids: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return which of ``ids`` have a row, and the rows."""
    if rows.ids is None:
        places = (ids < len(rows.rows)).nonzero().flatten()
        return places.to(device), rows.rows[ids[places].to(device)]
    at = torch.searchsorted(rows.ids, ids).clamp(max=len(rows.ids) - 1)
    places = (rows.ids[at] == ids).nonzero().flatten()
    return places.to(device), rows.rows[at[places].to(device)]


def _widened(base: Tensor, size: int) -> Tensor:
    """Return the base's logits [n, V] as the first ones of [n, size]; what has no base's is filled by rows."""
    if size <= base.shape[1]:
        return base[:, :size].clone()
    return F.pad(base, (0, size - base.shape[1]))


@dataclass(frozen=True, slots=True)
class _Head:
    """A change of the head, and the states [n, hidden] of the tokens that it answers."""

    delta: TokenDelta
    states: Tensor
    multiply: Multiply

    def add(self, base: Tensor, out: Tensor, weight: float | None) -> None:
        """Add it to ``out`` float32 [n, ids]; weight None: rows replace what is there."""
        rows, factors = self.delta.rows, self.delta.factors
        if rows is not None:
            own = self.multiply(self.states, rows.rows)[:, : out.shape[1]]
            columns = slice(0, own.shape[1]) if rows.ids is None else rows.ids.to(out.device)
            if weight is None:
                out[:, columns] = own
            else:
                out[:, columns] += weight * (own - base[:, columns])
        if factors is not None:
            shrunk = self.multiply(self.states, factors.a)
            if weight is not None:
                shrunk = shrunk * weight
            _add_in_pieces(out, shrunk, factors.b[:, : out.shape[1]].float())


def multiplied(x: Tensor, rows: Tensor) -> Tensor:
    """Do what Multiply says, in the rows' dtype."""
    limits = limits_on(rows.device, rows.dtype)
    count, wide = x.shape[0], rows.shape[0]
    x = F.pad(x.to(rows.dtype), (0, 0, 0, max(0, limits.least_rows - count)))
    if wide < limits.least_columns:
        rows = F.pad(rows, (0, 0, 0, limits.least_columns - wide))
    least = limits.least_size if rows.device.type == "cpu" else 0
    return product(x, rows, least)[:count, :wide].float()


def _add_in_pieces(out: Tensor, shrunk: Tensor, b: Tensor) -> None:
    """Add ``shrunk`` [n, r] b [r, m] to ``out`` [n, m]; all float32."""
    limits = limits_on(out.device, torch.float32)
    count = out.shape[0]
    shrunk = F.pad(shrunk, (0, 0, 0, max(0, limits.least_rows - count)))
    for first in range(0, b.shape[0], limits.most_depth):
        piece = slice(first, first + limits.most_depth)
        out += (shrunk[:, piece] @ b[piece])[:count]
