"""Adapters' own vocabularies on a device, for every backend: tensors by the range of units that an adapter owns."""

import torch
from torch import Tensor

from manylora.adapters.vocabulary import (
    VOCABULARY,
    TokenDelta,
    TokenFactors,
    TokenRows,
    VocabularyDelta,
)
from manylora.server.kernels.step import AdapterRanges, RankRange


class Vocabularies:
    """Those of the adapters on a device, by their ranges of units. Their memory is the budget's; see AdapterCache."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[int, tuple[RankRange, VocabularyDelta]] = {}
        """By the ranges' starts. Those of adapters that have been evicted stay until their units are written to."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(delta.nbytes for _, delta in self._held.values())

    def write(self, owned: RankRange, delta: VocabularyDelta) -> None:
        """Hold one. On a CPU it is the host's own copy, not another."""
        self.release(owned)
        self._held[owned.start] = owned, _on(delta, self._device)

    def release(self, owned: RankRange) -> None:
        """Let go of what lies in a range."""
        end = owned.start + owned.rank
        over = [
            start
            for start, (held, _) in self._held.items()
            if start < end and owned.start < start + held.rank
        ]
        for start in over:
            del self._held[start]

    def move(self, source: RankRange, target_start: int) -> None:
        """Note that a range begins elsewhere. Nothing is copied."""
        held = self._held.pop(source.start)
        target = RankRange(target_start, source.rank)
        self.release(target)
        self._held[target_start] = target, held[1]

    def take(self, ranges: AdapterRanges, delta: VocabularyDelta | None) -> AdapterRanges:
        """Hold an adapter's, if it has one; return the ranges that its factors go to."""
        owned = ranges.get(VOCABULARY)
        if owned is None:
            return ranges
        assert delta is not None, "the range was made for it"
        self.write(owned, delta)
        return {module: each for module, each in ranges.items() if module != VOCABULARY}

    def let_go(self, ranges: AdapterRanges) -> None:
        """Let go of what an adapter had."""
        if VOCABULARY in ranges:
            self.release(ranges[VOCABULARY])

    def of(self, owned: RankRange) -> VocabularyDelta:
        """Return the one in a range."""
        return self._held[owned.start][1]


def _on(delta: VocabularyDelta, device: torch.device) -> VocabularyDelta:
    """Return a vocabulary on a device; ids stay on the host. What embedding and head share stays one."""
    if device.type == "cpu":
        return delta
    moved: dict[int, Tensor] = {}

    def on_device(tensor: Tensor) -> Tensor:
        key = tensor.data_ptr()
        if key not in moved:
            moved[key] = tensor.to(device)
        return moved[key]

    def moved_delta(each: TokenDelta) -> TokenDelta:
        rows = None if each.rows is None else TokenRows(on_device(each.rows.rows), each.rows.ids)
        factors = each.factors
        if factors is not None:
            factors = TokenFactors(on_device(factors.a), on_device(factors.b))
        return TokenDelta(rows, factors)

    return VocabularyDelta(delta.size, moved_delta(delta.embedding), moved_delta(delta.head))
