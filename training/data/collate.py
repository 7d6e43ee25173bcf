"""Makes batches of tensors."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from manylora.training.data.render import IGNORED


class Batch(TypedDict, total=False):
    """What a model's forward pass takes. All of shape [rows, tokens], int64."""

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    """1 for tokens, 0 for padding. Not there in packed batches."""
    position_ids: Tensor
    """In packed batches alone: from 0 in every example, by which the model keeps examples apart."""


class Collator:
    """Pads items on the right to the longest, rounded up to a multiple of ``pad_to_multiple_of``.

    Packed items (those with position_ids) get no attention mask: transformers then lets a token see those of its own
    example alone, wherever position_ids begin anew, if it runs without a cache (``use_cache=False``). Padding is an
    example of its own there.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None) -> None:
        self._pad = pad_token_id
        self._multiple = pad_to_multiple_of or 1

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
        return batch
