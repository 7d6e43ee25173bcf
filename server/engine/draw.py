"""Vocabulary-sized arithmetic of sampling without a sort: block maxima, block sums, inverse CDF, top-k,
top-p.

It sees tensors only; sampler.py knows requests. Rows are independent to the bit: every reduction is over a
fixed block of one row, every running sum is over one row in float64, so a row's result does not depend on its
company. (On CUDA a float64 scan of a single row may be split otherwise than in a batch: a difference of the
last bit.)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
"""Vocabulary entries a block. The draw finds the block first, then the place inside it."""


def _by_block(x: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    vocabulary = x.shape[-1]
    whole = vocabulary // BLOCK
    body = reduce(x[..., : whole * BLOCK].view(*x.shape[:-1], whole, BLOCK))
    if whole * BLOCK == vocabulary:
        return body
    return torch.cat([body, reduce(x[..., whole * BLOCK :]).unsqueeze(-1)], dim=-1)


def block_sums(x: Tensor) -> Tensor:
    """Sum [..., V] within blocks: [..., ceil(V / BLOCK)]."""
    return _by_block(x, lambda part: part.sum(-1))


def block_maxima(x: Tensor) -> Tensor:
    """Maximum of [..., V] within blocks: [..., ceil(V / BLOCK)]. NaN wins."""
    return _by_block(x, lambda part: part.amax(-1))


def window(x: Tensor, rows: Tensor, blocks: Tensor, fill: float) -> tuple[Tensor, Tensor]:
    """Take the entries of ``blocks`` [m, k] from ``rows`` [m] of ``x`` [n, V]: (values, ids), each [m,
    k·BLOCK].

    Places beyond the vocabulary hold ``fill``.
    """
    ids = (blocks.unsqueeze(-1) * BLOCK + torch.arange(BLOCK, device=x.device)).flatten(1)
    values = x[rows.unsqueeze(1), ids.clamp(max=x.shape[1] - 1)]
    if x.shape[1] % BLOCK:
        values = values.masked_fill(ids >= x.shape[1], fill)
    return values, ids


def best(x: Tensor, rows: Tensor, maxima: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest value [m] and its lowest id [m] in ``rows`` [m] of ``x`` [n, V]; NaN counts as
    largest."""
    blocks = maxima[rows].argmax(-1, keepdim=True)
    values, ids = window(x, rows, blocks, -math.inf)
    place = values.argmax(-1, keepdim=True)
    return values.gather(1, place).squeeze(1), ids.gather(1, place).squeeze(1)


def _invert(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw an index from non-negative ``weights`` [m, k] float64 by ``u`` [m] in [0, 1).

    Returns the index [m], what is left of ``u`` inside it [m] in [0, 1), and the total weight [m]. An index
    of weight 0 is never drawn unless all are 0.
    """
    running = weights.cumsum(-1)
    total = running[:, -1]
    # u·total may round up to total, which is past the end.
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    index = (running <= target.unsqueeze(1)).sum(-1).clamp(max=weights.shape[1] - 1)
    here = index.unsqueeze(1)
    weight = weights.gather(1, here).squeeze(1)
    before = torch.where(index > 0, running.gather(1, (here - 1).clamp(min=0)).squeeze(1), 0.0)
    rest = ((target - before) / weight).clamp(0.0, 1.0)
    return index, rest, total


def draw_above(
    probs: Tensor, rows: Tensor, sums: Tensor, pivots: Tensor, u: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw from ``rows`` [m] of ``probs`` [n, V] restricted to entries above ``pivots`` [m], by inverse CDF.

    ``sums`` [m, blocks] are the block sums of the restricted rows, ``u`` [m] float64. Returns ids [m], their
    probabilities [m] and the restricted mass [m] float64 (NaN for a row that holds NaN).
    """
    block, rest, total = _invert(sums.double(), u)
    values, ids = window(probs, rows, block.unsqueeze(1), 0.0)
    place, _, _ = _invert(values.masked_fill(values <= pivots.unsqueeze(1), 0.0).double(), rest)
    here = place.unsqueeze(1)
    return ids.gather(1, here).squeeze(1), values.gather(1, here).squeeze(1), total


def sums_above(probs: Tensor, rows: Sequence[int], pivots: Sequence[float]) -> Tensor:
    """Block sums [m, blocks] of ``rows`` of ``probs`` [n, V] float32, counting only entries above each row's
    pivot."""
    if probs.is_cuda:
        limits = torch.tensor(pivots, device=probs.device, dtype=probs.dtype)
        return _sums_above(probs, torch.tensor(rows, device=probs.device), limits)
    # Row by row the copy stays in the core's cache: a sixth of the time of one masked pass over the batch.
    return torch.stack(
        [block_sums(F.threshold(probs[row], pivot, 0.0)) for row, pivot in zip(rows, pivots, strict=True)]
    )


def _sums_above(probs: Tensor, rows: Tensor, pivots: Tensor) -> Tensor:
    chosen = probs[rows]
    return block_sums(chosen.masked_fill_(chosen <= pivots.unsqueeze(1), 0.0))


@dataclass(frozen=True, slots=True)
class Judged:
    """Of m draws: what they were, and which of them lie outside the nucleus."""

    ids: list[int]
    probabilities: list[float]
    finite: list[bool]
    """Whether there was anything to draw from: False too for a row that holds NaN."""
    rejected: list[int]
    """Those outside: numbers in 0 … m − 1."""
    sums: Tensor
    """[rejected, blocks]: block sums of the entries above each of them."""


def judge(
    probs: Tensor, rows: Sequence[int], drawn: tuple[Tensor, Tensor, Tensor], top_p: Sequence[float]
) -> Judged:
    """Say of draw_above's results which lie outside: the mass above them is at least ``top_p`` (inf: none is)."""
    if probs.is_cuda and min(top_p) < math.inf:
        return _judge_at_once(probs, rows, drawn, top_p)
    ids, probabilities, mass = (each.tolist() for each in drawn)
    finite = [each > 0 for each in mass]
    asked = [j for j, limit in enumerate(top_p) if finite[j] and limit < math.inf]
    if not asked:
        return Judged(ids, probabilities, finite, [], probs[:0])
    sums = sums_above(probs, [rows[j] for j in asked], [probabilities[j] for j in asked])
    above = sums.double().cumsum(-1)[:, -1].tolist()
    outside = [place for place, j in enumerate(asked) if above[place] >= top_p[j]]
    chosen = torch.tensor(outside, device=probs.device, dtype=torch.int64)
    return Judged(ids, probabilities, finite, [asked[place] for place in outside], sums[chosen])


def _judge_at_once(
    probs: Tensor, rows: Sequence[int], drawn: tuple[Tensor, Tensor, Tensor], top_p: Sequence[float]
) -> Judged:
    """Judge on a device that is waited for only once: so all rows are, and what isn't asked is thrown away."""
    ids, probabilities, mass = drawn
    sums = _sums_above(probs, torch.tensor(rows, device=probs.device), probabilities)
    above = sums.double().cumsum(-1)[:, -1]
    told = torch.stack((ids.double(), probabilities.double(), mass, above)).tolist()
    finite = [each > 0 for each in told[2]]
    outside = [j for j, limit in enumerate(top_p) if finite[j] and told[3][j] >= limit]
    chosen = torch.tensor(outside, device=probs.device, dtype=torch.int64)
    return Judged([int(each) for each in told[0]], told[1], finite, outside, sums[chosen])


@dataclass(frozen=True, slots=True)
class Top:
    """The k best of some rows, and the candidates that they came from."""

    values: Tensor
    """[m, k], largest first."""
    candidates: Tensor
    """[m, c] values in the order of their ids; holds the k best, equal values by lowest id."""
    ids: Tensor
    """[m, c] the candidates' ids."""

    def id_at(self, rank: Tensor) -> Tensor:
        """Return the ids [m, j] at ``rank`` [m, j] (0 is best; of equal values the lower id is better)."""
        value = self.values.gather(1, rank)
        first = (self.values.unsqueeze(1) > value.unsqueeze(2)).sum(-1)
        wanted = rank - first
        equal = self.candidates.unsqueeze(1) == value.unsqueeze(2)
        place = (equal.cumsum(-1) <= wanted.unsqueeze(2)).sum(-1)
        return self.ids.gather(1, place.clamp(max=self.ids.shape[1] - 1))


def top(x: Tensor, rows: Tensor, maxima: Tensor, k: int) -> Top:
    """Find the ``k`` best of ``rows`` [m] of ``x`` [n, V], equal values by lowest id.

    They lie in the k blocks with the largest maxima: a block left out has k entries before it in this order.
    """
    if k >= maxima.shape[1]:
        every = torch.arange(maxima.shape[1], device=x.device).expand(len(rows), -1)
        candidates, ids = window(x, rows, every, -math.inf)
    else:
        order = maxima[rows].sort(dim=-1, descending=True, stable=True).indices[:, :k]
        candidates, ids = window(x, rows, order.sort(dim=-1).values, -math.inf)
    return Top(candidates.topk(k, dim=-1).values, candidates, ids)


def draw_top(found: Top, inverse_temperature: Tensor, top_p: Tensor, min_p: Tensor, u: Tensor) -> Tensor:
    """Draw ids [m] from the k best: temperature, then top_p over the renormalised k, then min_p. Parameters
    [m] float64."""
    scaled = (found.values - found.values[:, :1]).double() * inverse_temperature.unsqueeze(1)
    weights = torch.softmax(scaled, dim=-1)
    ranks = torch.arange(weights.shape[1], device=weights.device).expand_as(weights)
    starts = torch.ones_like(weights, dtype=torch.bool)
    starts[:, 1:] = found.values[:, 1:] != found.values[:, :-1]
    first = torch.where(starts, ranks, 0).cummax(-1).values
    above = (weights.cumsum(-1) - weights).gather(1, first)
    keep = (above < top_p.unsqueeze(1)) & (weights >= min_p.unsqueeze(1) * weights[:, :1])
    rank, _, _ = _invert(torch.where(keep, weights, 0.0), u)
    return found.id_at(rank.unsqueeze(1)).squeeze(1)
