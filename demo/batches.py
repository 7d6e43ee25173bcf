"""From examples to padded batches of token ids and of what is to be learnt in them."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerFast

from manylora.demo.examples import Example

POOL_BATCHES = 8
"""So many batches are drawn at once and sorted by length, so that little of a batch is padding."""

Draw = Callable[[random.Random], Example]


@dataclass(frozen=True)
class Batch:
    """`ids` (B, T) int64; `learnt` (B, T) bool, whether the next token is to be learnt; `targets` (L,) int64, those."""

    ids: torch.Tensor
    learnt: torch.Tensor
    targets: torch.Tensor


@dataclass(frozen=True)
class _Encoded:
    ids: list[int]
    learnt: list[bool]


def batches(draw: Draw, tokenizer: PreTrainedTokenizerFast, rows: int, rng: random.Random) -> Iterator[Batch]:
    """Endless batches of `rows` examples from `draw`."""
    while True:
        pool = _encode([draw(rng) for _ in range(rows * POOL_BATCHES)], tokenizer)
        pool.sort(key=lambda example: len(example.ids))
        starts = list(range(0, len(pool), rows))
        rng.shuffle(starts)
        for start in starts:
            yield _pad(pool[start : start + rows], tokenizer.pad_token_id)


def loss(hidden: torch.Tensor, head: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The mean cross-entropy of the learnt tokens, in float32; `hidden` (B, T, H) goes through `head` only there."""
    logits = head(hidden[batch.learnt])
    return F.cross_entropy(logits.float(), batch.targets)


def _encode(examples: list[Example], tokenizer: PreTrainedTokenizerFast) -> list[_Encoded]:
    texts = [segment.text for example in examples for segment in example]
    pieces = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    encoded = []
    for example in examples:
        ids: list[int] = []
        learnt: list[bool] = []
        for segment in example:
            piece = next(pieces)
            ids += piece
            learnt += [segment.learnt] * len(piece)
        encoded.append(_Encoded(ids, learnt))
    return encoded


def _pad(rows: list[_Encoded], pad: int) -> Batch:
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), pad)
    learnt = torch.zeros(len(rows), length, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        learnt[index, : len(row.ids)] = torch.tensor(row.learnt)
    return Batch(ids[:, :-1], learnt[:, 1:], ids[:, 1:][learnt[:, 1:]])
