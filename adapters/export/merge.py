"""Base and adapter as one set of weights, a few rows at a time in float32, and what becomes of a tied head."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.adapters.export.base import BaseCheckpoint, BaseWeights
from manylora.adapters.export.change import Changes
from manylora.adapters.export.errors import ExportRefused
from manylora.adapters.export.matrix_change import Change
from manylora.adapters.export.outline import EMBEDDING, HEAD, ModelOutline
from manylora.adapters.export.rows import DenseRows, Rows


@dataclass(frozen=True, slots=True)
class ChangedRows:
    """Another matrix's rows with a change added, float32."""

    source: Rows
    change: Change

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return self.source.shape

    def rows(self, first: int, last: int) -> Tensor:
        """Return changed rows."""
        return self.change.on(self.source.rows(first, last), slice(first, last))

    def take(self, indices: Tensor) -> Tensor:
        """Return some changed rows."""
        return self.change.on(self.source.take(indices), indices)


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """Whether the merged model's head is its embedding, as it was in the base and as it will be."""

    was_tied: bool
    tied: bool

    @property
    def untied(self) -> bool:
        """Whether the two have drifted apart."""
        return self.was_tied and not self.tied


def plan_head(base: BaseCheckpoint, adapter: Changes, outline: ModelOutline) -> HeadPlan:
    """Tell whether embedding and head are still one matrix once ``adapter`` is merged."""
    if base.has_own_head(outline):
        return HeadPlan(was_tied=False, tied=False)
    touched = adapter.touches(EMBEDDING) or adapter.touches(HEAD)
    if not touched or adapter.keeps_tied:
        return HeadPlan(was_tied=True, tied=True)
    embedding, head = adapter.whole(EMBEDDING), adapter.whole(HEAD)
    same = embedding is not None and head is not None and torch.equal(embedding, head)
    factors = {EMBEDDING, HEAD} & set(adapter.changed)
    return HeadPlan(was_tied=True, tied=same and not factors)


class MergedWeights:
    """The parameters of base + adapter by name, exact in float32."""

    def __init__(self, base: BaseWeights, adapter: Changes, head: HeadPlan) -> None:
        self._base = base
        self._adapter = adapter
        self._head = head

    def unchanged(self, name: str) -> Rows:
        """Return a parameter without the factors: the base's, or the tensor that the adapter brings."""
        owner = self._owner(name)
        whole = self._adapter.whole(owner)
        if whole is not None:
            return DenseRows(whole)
        return self._base.rows(EMBEDDING if self._head.was_tied and owner == HEAD else owner)

    def change(self, name: str) -> Change | None:
        """Return what the adapter adds to ``unchanged``."""
        return self._adapter.change(self._owner(name))

    def rows(self, name: str) -> Rows:
        """Return a parameter with everything in it."""
        source, change = self.unchanged(name), self.change(name)
        return source if change is None else ChangedRows(source, change)

    def _owner(self, name: str) -> str:
        """Return whose changes a parameter has: of a tied pair, the one that the adapter touches."""
        if name in (EMBEDDING, HEAD) and self._head.tied:
            return EMBEDDING if self._adapter.touches(EMBEDDING) or not self._adapter.touches(HEAD) else HEAD
        return name


def merged_shapes(outline: ModelOutline, adapter: Changes, head: HeadPlan) -> Mapping[str, tuple[int, ...]]:
    """Return the parameters to write, in order, without a tied head; the vocabulary may have grown.

    Raises ExportRefused if embedding and head would have different vocabularies.
    """
    shapes = {name: adapter.shape_of(name) or shape for name, shape in outline.shapes.items()}
    if head.tied:
        owned = shapes.pop(HEAD)
        if adapter.shape_of(EMBEDDING) is None:
            shapes[EMBEDDING] = owned
    elif shapes[HEAD][0] != shapes[EMBEDDING][0]:
        raise ExportRefused(
            f"the adapter makes an embedding of {shapes[EMBEDDING][0]} tokens and a head of {shapes[HEAD][0]};"
            " save both with modules_to_save"
        )
    return shapes
