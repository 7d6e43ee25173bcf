"""Makes batches of tensors."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from manylora.training.data.activation import NOWHERE, place_of
from manylora.training.data.render import IGNORED


class Batch(TypedDict, total=False):
    """What a model's forward pass takes. All of shape [rows, tokens], int64."""

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    """1 for tokens, 0 for padding. Not there in packed batches."""
    position_ids: Tensor
    """In packed batches alone: from 0 in every example, by which the model keeps examples apart."""
    activated_at: Tensor
    """[rows, 1], for an activated adapter alone: from which token on it acts; NOWHERE."""


class Collator:
    """Pads items on the right to the longest, rounded up to a multiple of ``pad_to_multiple_of``.

    Packed items (those with position_ids) get no attention mask: transformers then lets a token see those of its own
    example alone, wherever position_ids begin anew, if it runs without a cache (``use_cache=False``). Padding is an
    example of its own there.
    """

    def __init__(
        self, pad_token_id: int, pad_to_multiple_of: int | None = None, invocation: Sequence[int] = ()
    ) -> None:
        """``invocation`` of an activated adapter: tokens are trained where it acts."""
        self._pad = pad_token_id
        self._multiple = pad_to_multiple_of or 1
        self._invocation = tuple(invocation)

    def __call__(self, items: Sequence[Mapping[str, Sequence[int]]]) -> Batch:
        """Collate items of ``input_ids``, ``labels`` and, when packed, ``position_ids``."""
        longest = max(len(item["input_ids"]) for item in items)
        width = -(-longest // self._multiple) * self._multiple
        batch = Batch(
            input_ids=torch.full((len(items), width), self._pad),
            labels=torch.full((len(items), width), IGNORED),
        )
        packed = "position_ids" in items[0]
        if packed:
            batch["position_ids"] = torch.zeros((len(items), width), dtype=torch.long)
        else:
            batch["attention_mask"] = torch.zeros((len(items), width), dtype=torch.long)
        for row, item in enumerate(items):
            count = len(item["input_ids"])
            batch["input_ids"][row, :count] = torch.tensor(item["input_ids"])
            batch["labels"][row, :count] = torch.tensor(item["labels"])
            if packed:
                batch["position_ids"][row, :count] = torch.tensor(item["position_ids"])
                batch["position_ids"][row, count:] = torch.arange(width - count)
            else:
                batch["attention_mask"][row, :count] = 1
        if self._invocation:
            self._activate(batch, items)
        return batch

    def _activate(self, batch: Batch, items: Sequence[Mapping[str, Sequence[int]]]) -> None:
        """Say from where on the adapter acts, and train no token that is predicted before that."""
        places = [place_of(self._invocation, item["input_ids"], item["labels"]) for item in items]
        for row, place in enumerate(places):
            # The token at the place itself is predicted by the one before it, which is the base's.
            batch["labels"][row, : place + 1 if place != NOWHERE else None] = IGNORED
        batch["activated_at"] = torch.tensor(places)[:, None]
