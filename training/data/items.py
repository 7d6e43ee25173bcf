"""Items that are made when they are asked for: rows of several examples."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from manylora.training.data.render import IGNORED

Item = dict[str, list[int]]


class PackedItems(Dataset[Item]):
    """Rows of several examples each.

    Positions begin at 0 in every example, and every example's first token isn't trained: a model would have to
    predict it from the example before.
    """

    def __init__(self, tokens: Any, rows: Sequence[Sequence[int]]) -> None:
        """``tokens`` is a datasets.Dataset of single examples, ``rows`` the numbers of those in each row."""
        self._tokens = tokens
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Item:
        examples = self._tokens[list(self._rows[index])]
        item: Item = {"input_ids": [], "labels": [], "position_ids": []}
        for ids, labels in zip(examples["input_ids"], examples["labels"], strict=True):
            item["input_ids"] += ids
            item["labels"] += [IGNORED, *labels[1:]]
            item["position_ids"] += range(len(ids))
        return item
