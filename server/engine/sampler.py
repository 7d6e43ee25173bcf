"""Chooses one token for each row of a step's logits, and reports logprobs.

It neither ends sequences (stop.py) nor remembers them: SamplerState does, and the engine appends to it. A
row's choice is a function of its logits, its parameters and its state, whoever shares the batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from manylora.server.engine.columns import COLDEST, columns_of
from manylora.server.engine.draw import (
    best,
    block_maxima,
    block_sums,
    draw_above,
    draw_top,
    judge,
    sums_above,
    top,
)
from manylora.server.engine.logits import SamplerState, SamplingRow, edit_logits, hide_masked
from manylora.server.engine.prompt_logprobs import NO_ROWS, LogprobRows
from manylora.server.engine.request import SamplingParams, TokenLogprobs
from manylora.server.kernels.sampling import UNTOLD, NativeSampling, Sampled

__all__ = ["NOT_FINITE", "SampleFault", "SampledToken", "Sampler", "SamplerState", "SamplingRow"]

_CACHED_ROWS = 8
"""Rows sampled at once on a CPU: 150,000 entries each in float32, twice over, are 10 MB."""


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A row's next token; ``logprobs`` where the request asked for them."""

    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class SampleFault:
    """A row whose activations or logits are not finite, so that nothing can be sampled. It concerns that row alone."""

    message: str


NOT_FINITE = SampleFault(
    "what the model computes for this request is not finite: the base or the adapter's weights overflow"
)


class Sampler:
    """Samples a step. Holds two scratch buffers of [rows of a part, V] float32; not
    thread-safe."""

    def __init__(
        self, vocab_size: int, device: torch.device | str, native: NativeSampling | None = None
    ) -> None:
        """``native``: the backend's own sampling, if it has one."""
        self._native = native
        self.vocab_size = vocab_size
        self._device = torch.device(device)
        self._probs = torch.empty(0, vocab_size, device=self._device)
        self._scaled = torch.empty(0, vocab_size, device=self._device)

    def sized(self, vocab_size: int) -> "Sampler":
        """Return a sampler of another number of ids."""
        return Sampler(vocab_size, self._device, self._native)

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken | SampleFault]:
        """Choose a token for each row of ``logits`` [n, V] float32, contiguous. They are changed and put
        back.

        Does not append to the states. Logprobs are of the raw distribution: before masks, penalties and temperature.
        """
        if logits.shape != (len(rows), self.vocab_size) or logits.dtype != torch.float32:
            raise ValueError(
                f"logits are {list(logits.shape)} {logits.dtype}, "
                f"expected [{len(rows)}, {self.vocab_size}] torch.float32"
            )
        if not rows:
            return []
        edits = edit_logits(logits, rows)
        if self._native is not None:
            columns = columns_of(rows, self.vocab_size)
            told, columns = columns.told, replace(columns, told=np.full_like(columns.told, UNTOLD))
            sampled = self._native.draw(logits, columns)
            edits.restore(logits)
            if (told == UNTOLD).all():
                return tokens_of(sampled, told.tolist())
            return tokens_of(self._native.report(logits, columns.places, sampled.ids, told), told.tolist())
        hidden = hide_masked(logits, rows)
        chosen: list[int | None] = [None] * len(rows)
        for ids, members in self._by_kind(logits, rows, range(len(rows))):
            for row, token_id in zip(members, ids, strict=True):
                chosen[row] = token_id
        hidden.restore(logits)
        edits.restore(logits)
        self._leave_out_unreportable(logits, rows, chosen)
        reports = self._reports(logits, rows, chosen)
        return [
            NOT_FINITE if token is None else SampledToken(token, reports.get(row))
            for row, token in enumerate(chosen)
        ]

    @torch.inference_mode()
    def prompt_logprobs(
        self, logits: Tensor, next_token_ids: Sequence[int], top: int
    ) -> LogprobRows | SampleFault:
        """Report the logprob of each row's next prompt token, and the ``top`` best: ``logits`` [n, V]
        float32. A fault in one of the rows is the answer for all."""
        if not len(next_token_ids):
            return NO_ROWS
        if self._native is not None:
            return self._native_rows(self._native, logits, next_token_ids, top)
        if not bool(torch.isfinite(logits.amax(-1)).all()):
            return NOT_FINITE
        parts = self._parts(list(range(len(next_token_ids))))
        found = [self._logprobs(logits, part, [next_token_ids[i] for i in part], top) for part in parts]
        columns = ("token_ids", "logprobs", "top_ids", "top_logprobs")
        return LogprobRows(*(np.concatenate([getattr(rows, name) for rows in found]) for name in columns))

    def _native_rows(
        self, native: NativeSampling, logits: Tensor, next_token_ids: Sequence[int], top: int
    ) -> LogprobRows | SampleFault:
        count = len(next_token_ids)
        ids, told = np.array(next_token_ids, dtype=np.int32), np.full(count, top, dtype=np.int32)
        found = native.report(logits, np.arange(count, dtype=np.int32), ids, told)
        if (found.ids < 0).any():
            return NOT_FINITE
        return LogprobRows(
            found.ids.astype(np.int64), found.logprobs, found.top_ids.astype(np.int64), found.top_logprobs
        )

    def _by_kind(
        self, logits: Tensor, rows: Sequence[SamplingRow], members: Sequence[int]
    ) -> list[tuple[list[int | None], list[int]]]:
        """Choose for ``members`` in torch: in parts for the greedy, for each top_k, and for the rest."""
        greedy: list[int] = []
        wide: list[int] = []
        by_k: dict[int, list[int]] = {}
        for i in members:
            row = rows[i]
            if row.params.temperature <= 0:
                greedy.append(i)
            elif 0 < row.params.top_k < self.vocab_size:
                by_k.setdefault(row.params.top_k, []).append(i)
            else:
                wide.append(i)
        choices: list[tuple[list[int | None], list[int]]] = []
        if greedy or by_k:
            maxima = block_maxima(logits)
            if greedy:
                choices.append((self._greedy(logits, maxima, greedy), greedy))
            choices += [(self._top_k(logits, maxima, rows, m, k), m) for k, m in by_k.items()]
        for part in self._parts(wide):
            choices.append((self._wide(logits, rows, part), part))
        return choices

    def _parts(self, members: list[int]) -> list[list[int]]:
        """Cut rows into parts that stay in a CPU's cache; a GPU takes them all, for fewer transfers."""
        size = _CACHED_ROWS if self._device.type == "cpu" else max(len(members), 1)
        return [members[start : start + size] for start in range(0, len(members), size)]

    def _take(self, logits: Tensor, members: list[int]) -> Tensor:
        """Rows ``members`` (ascending) of ``logits``: a view of neighbours, else a copy in scratch memory."""
        if members[-1] - members[0] + 1 == len(members):
            return logits[members[0] : members[-1] + 1]
        return torch.index_select(logits, 0, self._index(members), out=self._buffer("_scaled", len(members)))

    def _greedy(self, logits: Tensor, maxima: Tensor, members: list[int]) -> list[int | None]:
        values, ids = best(logits, self._index(members), maxima)
        return _to_host(ids, torch.isfinite(values))

    def _top_k(
        self, logits: Tensor, maxima: Tensor, rows: Sequence[SamplingRow], members: list[int], k: int
    ) -> list[int | None]:
        found = top(logits, self._index(members), maxima, k)
        params = [rows[i].params for i in members]
        ids = draw_top(
            found,
            self._column([1.0 / max(p.temperature, COLDEST) for p in params]),
            self._column([_top_p(p) for p in params]),
            self._column([p.min_p for p in params]),
            self._column([rows[i].state.uniform(0) for i in members]),
        )
        return _to_host(ids, torch.isfinite(found.values[:, 0]))

    def _wide(self, logits: Tensor, rows: Sequence[SamplingRow], members: list[int]) -> list[int | None]:
        """Sample rows without top_k by rejection: draw from what lies above the pivot, accept inside the
        nucleus.

        A token is in the nucleus if the mass strictly above its probability is below top_p. One that is not
        becomes the pivot: the nucleus lies above it whole, so the next draw from there is as exact as the
        first. The sums that decide are those that the next draw needs (the idea is FlashInfer's, 2501.01005).
        """
        probs = self._softmax(logits, rows, members)
        params = [rows[i].params for i in members]
        sums, pivots = self._floor(probs, params)
        chosen: list[int | None] = [None] * len(members)
        waiting = list(range(len(members)))
        attempt = 0
        while waiting:
            u = [rows[members[w]].state.uniform(attempt) for w in waiting]
            limits = torch.tensor(pivots, device=self._device, dtype=torch.float32)
            drawn = draw_above(probs, self._index(waiting), sums, limits, self._column(u))
            judged = judge(probs, waiting, drawn, [_top_p(params[w]) for w in waiting])
            for w, token_id, finite in zip(waiting, judged.ids, judged.finite, strict=True):
                if finite:
                    chosen[w] = token_id
            if not judged.rejected:
                break
            sums = judged.sums
            pivots = [judged.probabilities[j] for j in judged.rejected]
            waiting = [waiting[j] for j in judged.rejected]
            attempt += 1
        return chosen

    def _softmax(self, logits: Tensor, rows: Sequence[SamplingRow], members: list[int]) -> Tensor:
        """Probabilities [m, V] at each row's temperature, in scratch memory that the next call overwrites."""
        cold = [rows[i].params.temperature for i in members]
        source = self._take(logits, members)
        if any(temperature != 1.0 for temperature in cold):
            scale = self._column([1.0 / max(temperature, COLDEST) for temperature in cold])
            buffer = self._buffer("_scaled", len(members))
            source = torch.mul(source, scale.float().unsqueeze(1), out=buffer)
        return torch.softmax(source, dim=-1, out=self._buffer("_probs", len(members)))

    def _floor(self, probs: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, list[float]]:
        """Block sums and pivots to begin with: everything, or for rows with min_p what reaches its share of
        the best."""
        sums = block_sums(probs)
        pivots = [0.0] * len(params)
        members = [w for w, p in enumerate(params) if p.min_p > 0]
        if not members:
            return sums, pivots
        best_probs = block_maxima(probs)[self._index(members)].amax(-1)
        floors = best_probs * self._column([min(params[w].min_p, 1.0) for w in members]).float()
        # Entries at the floor stay: the pivot is the next smaller number.
        below = torch.nextafter(floors, torch.zeros_like(floors)).tolist()
        sums[self._index(members)] = sums_above(probs, members, below)
        for w, pivot in zip(members, below, strict=True):
            pivots[w] = pivot
        return sums, pivots

    def _leave_out_unreportable(
        self, logits: Tensor, rows: Sequence[SamplingRow], chosen: list[int | None]
    ) -> None:
        """Drop choices of rows whose logprobs are asked for and aren't finite: an edit had hidden what isn't."""
        asked = [
            i for i, token in enumerate(chosen) if token is not None and rows[i].params.logprobs is not None
        ]
        if asked:
            finite = torch.isfinite(block_maxima(logits)[self._index(asked)].amax(-1))
            for i, sound in zip(asked, finite.tolist(), strict=True):
                if not sound:
                    chosen[i] = None

    def _reports(
        self, logits: Tensor, rows: Sequence[SamplingRow], chosen: Sequence[int | None]
    ) -> dict[int, TokenLogprobs]:
        asked = [
            (i, token, n)
            for i, token in enumerate(chosen)
            if token is not None
            for n in [rows[i].params.logprobs]
            if n is not None
        ]
        if not asked:
            return {}
        tokens = {i: token for i, token, _ in asked}
        counts = {i: n for i, _, n in asked}
        reports: dict[int, TokenLogprobs] = {}
        for part in self._parts(list(tokens)):
            found = self._logprobs(logits, part, [tokens[i] for i in part], max(counts[i] for i in part))
            for i, report in zip(part, found.tokens(), strict=True):
                reports[i] = TokenLogprobs(report.token_id, report.logprob, report.top[: counts[i]])
        return reports

    def _logprobs(self, logits: Tensor, members: list[int], token_ids: list[int], count: int) -> LogprobRows:
        """Natural log of the softmax of the raw logits at ``token_ids`` and at the ``count`` best, rows
        ``members``."""
        source = self._take(logits, members)
        every = self._index(list(range(len(members))))
        probs = torch.softmax(source, dim=-1, out=self._buffer("_probs", len(members)))
        maxima = block_maxima(source)
        found = top(source, every, maxima, min(max(count, 1), self.vocab_size))
        best_id = found.id_at(torch.zeros_like(every).unsqueeze(1))
        # log p(x) = x - max + log p(max): exact where p(x) itself would underflow.
        offset = probs.gather(1, best_id).double().log() - found.values[:, :1].double()
        own = source.gather(1, self._index(token_ids).unsqueeze(1)).double() + offset
        ranks = (
            torch.arange(count, device=self._device).clamp(max=self.vocab_size - 1).expand(len(members), -1)
        )
        values = found.values[:, :count].double() + offset
        ids = (
            found.id_at(ranks)[:, : values.shape[1]].cpu().numpy()
            if count
            else np.empty((len(members), 0), np.int64)
        )
        tokens = np.array(token_ids, dtype=np.int64)
        return LogprobRows(tokens, own[:, 0].cpu().numpy(), ids, values.cpu().numpy())

    def _buffer(self, name: str, count: int) -> Tensor:
        held: Tensor = getattr(self, name)
        if len(held) < count:
            held = torch.empty(count, self.vocab_size, device=self._device)
            setattr(self, name, held)
        return held[:count]

    def _index(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, device=self._device, dtype=torch.int64)

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self._device, dtype=torch.float64)


def tokens_of(sampled: Sampled, told: Sequence[int]) -> list[SampledToken | SampleFault]:
    """Return a backend's tokens as objects; ``told``: how many alternatives each row wants to know, or UNTOLD."""
    ids = sampled.ids.tolist()
    reports = {
        row: _report(sampled, row, ids[row], count) for row, count in enumerate(told) if count != UNTOLD
    }
    return [
        NOT_FINITE if token < 0 else SampledToken(token, reports.get(row)) for row, token in enumerate(ids)
    ]


def _report(sampled: Sampled, row: int, token: int, count: int) -> TokenLogprobs:
    best, values = sampled.top_ids[row, :count].tolist(), sampled.top_logprobs[row, :count].tolist()
    return TokenLogprobs(token, float(sampled.logprobs[row]), tuple(zip(best, values, strict=True)))


def _top_p(params: SamplingParams) -> float:
    """The mass that the tokens above must stay below; the best token has none above it and always stays."""
    return max(params.top_p, 1e-300) if params.top_p < 1.0 else math.inf


def _to_host(ids: Tensor, finite: Tensor) -> list[int | None]:
    """Bring ids to the host in one transfer; None where the row is not finite."""
    return [int(i) if i >= 0 else None for i in torch.where(finite, ids, -1).tolist()]
