"""A sequence's sampling state, and the sparse changes that it makes to its row of logits before a token is
chosen.

Penalties, then logit_bias, then the min_tokens mask. It knows nothing of how a token is drawn (sampler.py) or
of when a sequence ends (stop.py).
"""

import hashlib
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manylora.server.engine.grammar import Words
from manylora.server.engine.request import SamplingParams

MASK_64 = (1 << 64) - 1
"""Seeds and counters are numbers modulo 2^64."""
_FIRST_ROOM = 64


class SamplerState:
    """What sampling must remember of one sequence: its seed, its length, and the tokens that penalties count.

    ``choice_index`` is the choice's place among the request's n; it selects the random stream. ``eos_ids``
    are the ids that min_tokens masks beside the stop ids (not with ``ignore_eos``).
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        choice_index: int = 0,
        eos_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(8), "little")
        self.choice_index = choice_index
        self.output_length = 0
        ends = {*params.stop_token_ids, *params.stop_names}
        if not params.ignore_eos:
            ends |= eos_ids
        self._end_ids = np.array(sorted(ends), dtype=np.int64)
        self._min_tokens = params.min_tokens
        self._bias_ids = np.fromiter(params.logit_bias.keys(), dtype=np.int64)
        self._bias = np.fromiter(params.logit_bias.values(), dtype=np.float32)
        self.counts_tokens = bool(
            params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
        )
        self._edits = self.counts_tokens or bool(params.logit_bias)
        self._slots: dict[int, int] = {}
        self._ids = np.zeros(_FIRST_ROOM, dtype=np.int64)
        self._counts = np.zeros(_FIRST_ROOM, dtype=np.float32)
        if self.counts_tokens and params.repetition_penalty != 1.0:
            for token_id in prompt_token_ids:
                self._slot(token_id)

    def append(self, token_id: int) -> None:
        """Take note of the token that was chosen. The engine calls it once for every sampled token."""
        self.output_length += 1
        if self.counts_tokens:
            slot = self._slot(token_id)  # may replace the arrays: before they are looked up
            self._counts[slot] += 1

    def uniform(self, draw: int) -> float:
        """Return the ``draw``-th number in [0, 1) for the next position: a pure function of seed, choice and
        place.

        53 bits of BLAKE2b over (seed, choice, position, draw): no generator that others could advance.
        """
        counter = struct.pack("<QQQQ", self.seed & MASK_64, self.choice_index, self.output_length, draw)
        digest = hashlib.blake2b(counter, digest_size=8).digest()
        return float((int.from_bytes(digest, "little") >> 11) * 2.0**-53)

    @property
    def edits(self) -> bool:
        """Whether ``edit_logits`` may change the row before its next token is chosen."""
        return self._edits or self.output_length < self._min_tokens

    @property
    def seen_ids(self) -> NDArray[np.int64]:
        """Distinct token ids under penalty [S]: the output's and, for the repetition penalty, the
        prompt's."""
        return self._ids[: len(self._slots)]

    @property
    def seen_counts(self) -> NDArray[np.float32]:
        """How often each of ``seen_ids`` occurs in the output [S]."""
        return self._counts[: len(self._slots)]

    @property
    def bias(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """logit_bias as ids [K] and values [K]."""
        return self._bias_ids, self._bias

    @property
    def masked_ids(self) -> NDArray[np.int64]:
        """Ids that may not be chosen at the next position."""
        return self._end_ids if self.output_length < self._min_tokens else self._end_ids[:0]

    def _slot(self, token_id: int) -> int:
        slot = self._slots.get(token_id)
        if slot is not None:
            return slot
        slot = len(self._slots)
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._slots[token_id] = slot
        self._ids[slot] = token_id
        return slot


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One row of a step's logits: how to sample it, and its sequence's state."""

    params: SamplingParams
    state: SamplerState
    mask: Words | None = None
    """[words] int32: bits of the ids that may be chosen, the lowest first; None: all."""


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """What ``edit_logits`` and ``hide_masked`` overwrote, to put it back."""

    undo: tuple[tuple[Tensor, Tensor], ...] = ()
    """(places in the flat logits, what stood there), in the order of writing."""
    rows: tuple[Tensor, Tensor] | None = None
    """(row numbers, what stood in them), written after all others."""

    def restore(self, logits: Tensor) -> None:
        """Give the logits their values from before the edits."""
        if self.rows is not None:
            logits[self.rows[0]] = self.rows[1]
        flat = logits.view(-1)
        for places, values in reversed(self.undo):
            flat[places] = values


def edit_logits(logits: Tensor, rows: Sequence[SamplingRow]) -> LogitEdits:
    """Apply penalties, logit_bias and the min_tokens mask to ``logits`` [n, V] float32 in place.

    Touches only the ids concerned. Ids beyond the vocabulary are left out (the API refuses them earlier).
    """
    stages = (_penalties, _biases, _masks)
    undo = [change for stage in stages if (change := stage(logits, rows)) is not None]
    return LogitEdits(tuple(undo))


def hide_masked(logits: Tensor, rows: Sequence[SamplingRow]) -> LogitEdits:
    """Set what the rows' masks hide to -inf in ``logits`` [n, V] float32, in place."""
    masked = [(number, row.mask) for number, row in enumerate(rows) if row.mask is not None]
    if not masked:
        return LogitEdits()
    numbers = torch.tensor([number for number, _ in masked], device=logits.device)
    # Whole bytes go to the device, an eighth of a byte an id; they are spread there.
    words = torch.from_numpy(np.stack([mask for _, mask in masked]).view(np.uint8)).to(logits.device)
    bits = (words.unsqueeze(-1) >> torch.arange(8, device=logits.device, dtype=torch.uint8)) & 1
    old = logits[numbers]
    hidden = bits.flatten(1)[:, : logits.shape[1]] == 0
    logits[numbers] = old.masked_fill(hidden, -math.inf)
    return LogitEdits(rows=(numbers, old))


def _places(
    logits: Tensor, parts: list[tuple[int, NDArray[np.int64]]], *columns: NDArray[np.float32]
) -> tuple[Tensor, list[Tensor]]:
    """Turn (row, ids) pairs into places in the flat logits, and the columns of values into tensors beside
    them."""
    vocabulary = logits.shape[1]
    ids = np.concatenate([part for _, part in parts])
    starts = np.repeat([row * vocabulary for row, _ in parts], [len(part) for _, part in parts])
    valid = (ids >= 0) & (ids < vocabulary)
    tensors = [torch.from_numpy(a[valid]).to(logits.device) for a in (ids + starts, *columns)]
    return tensors[0], tensors[1:]


def _penalties(logits: Tensor, rows: Sequence[SamplingRow]) -> tuple[Tensor, Tensor] | None:
    active = [i for i, row in enumerate(rows) if row.state.counts_tokens and len(row.state.seen_ids)]
    if not active:
        return None
    states = [rows[i].state for i in active]
    sizes = [len(state.seen_ids) for state in states]

    def column(name: str) -> NDArray[np.float32]:
        return np.repeat(np.array([getattr(rows[i].params, name) for i in active], dtype=np.float32), sizes)

    counts = np.concatenate([state.seen_counts for state in states])
    linear = column("frequency_penalty") * counts + column("presence_penalty") * (counts > 0)
    places, (repetition, subtract) = _places(
        logits,
        [(i, state.seen_ids) for i, state in zip(active, states, strict=True)],
        column("repetition_penalty"),
        linear.astype(np.float32),
    )
    flat = logits.view(-1)
    old = flat[places]
    flat[places] = torch.where(old > 0, old / repetition, old * repetition) - subtract
    return places, old


def _biases(logits: Tensor, rows: Sequence[SamplingRow]) -> tuple[Tensor, Tensor] | None:
    active = [(i, row.state.bias) for i, row in enumerate(rows) if len(row.state.bias[0])]
    if not active:
        return None
    places, (bias,) = _places(
        logits, [(i, ids) for i, (ids, _) in active], np.concatenate([values for _, (_, values) in active])
    )
    flat = logits.view(-1)
    old = flat[places]
    flat[places] = old + bias
    return places, old


def _masks(logits: Tensor, rows: Sequence[SamplingRow]) -> tuple[Tensor, Tensor] | None:
    active = [(i, row.state.masked_ids) for i, row in enumerate(rows) if len(row.state.masked_ids)]
    if not active:
        return None
    places, _ = _places(logits, active)
    flat = logits.view(-1)
    old = flat[places]
    flat[places] = -math.inf
    return places, old
