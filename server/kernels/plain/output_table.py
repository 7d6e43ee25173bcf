"""What a decode step's adapters do to modules' own outputs, as tables of fixed size beside lora_table.py's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from manylora.server.kernels.output_rows import OutputRows
from manylora.server.kernels.plain.mirrored import Mirrored
from manylora.server.kernels.plain.outputs import Terms, changed
from manylora.server.kernels.step import Floats, Ints, RankRange

Uses = Sequence[tuple[int, RankRange, float]]
"""(row, range, weight)"""


@dataclass(frozen=True, slots=True)
class TermTable:
    """Σ weight · row of the arena's B, for each row of a step and each module, on the host."""

    rows: Ints
    """[terms, B, modules]"""
    weights: Floats
    """[terms, B, modules]: 0 where there is no such term."""

    @classmethod
    def of(
        cls,
        uses: Sequence[Uses],
        modules: Sequence[str],
        find: Callable[[str, RankRange], int | None],
        count: int,
    ) -> "TermTable":
        """Lay out what ``find`` finds of the ranges that each module's rows use, in the order of their adapters."""
        found: dict[tuple[int, int], list[tuple[int, float]]] = {}
        for number, module in enumerate(modules):
            for row, owned, weight in uses[number]:
                place = find(module, owned)
                if place is not None:
                    found.setdefault((row, number), []).append((place, weight))
        most = max(map(len, found.values()), default=0)
        rows = np.zeros((most, count, len(modules)), dtype=np.int32)
        weights = np.zeros((most, count, len(modules)), dtype=np.float32)
        for (row, number), each in found.items():
            for nth, (place, weight) in enumerate(each):
                rows[nth, row, number], weights[nth, row, number] = place, weight
        return cls(rows, weights)


@dataclass(frozen=True, slots=True)
class OutputTable:
    """A step's gains and offsets, on the host."""

    gains: TermTable
    offsets: TermTable

    @classmethod
    def of(
        cls, uses: Sequence[Uses], modules: Sequence[str], output_rows: OutputRows, count: int
    ) -> "OutputTable":
        """Lay out the ranges that each of ``modules`` uses, in ``count`` rows."""
        kinds = (output_rows.gain, output_rows.offset)
        return cls(*(TermTable.of(uses, modules if output_rows else (), kind, count) for kind in kinds))

    @property
    def terms(self) -> tuple[int, int]:
        """How many gains and how many offsets a row has of a module, at most."""
        return len(self.gains.rows), len(self.offsets.rows)


class MirroredOutputs:
    """A table's arrays, where they stay for all steps of a size."""

    def __init__(self, terms: tuple[int, int], rows: int, modules: int, device: torch.device) -> None:
        """``rows`` of a step, padding included."""
        shapes = [(number, rows, modules) for number in terms]
        self._rows = [Mirrored(shape, torch.int32, device) for shape in shapes]
        self._weights = [Mirrored(shape, torch.float32, device) for shape in shapes]

    def fill(self, table: OutputTable) -> None:
        """Say what a step's are; rows of padding have none."""
        for terms, rows, weights in zip((table.gains, table.offsets), self._rows, self._weights, strict=True):
            if len(terms.rows):
                count = terms.rows.shape[1]
                rows.host[:, :count], weights.host[:, :count], weights.host[:, count:] = (
                    terms.rows,
                    terms.weights,
                    0,
                )
                rows.send()
                weights.send()

    def on_device(self) -> "TableOutputs":
        """Return them as a step reads them."""
        pairs = zip(self._rows, self._weights, strict=True)
        gains, offsets = (Terms(rows.device.long(), weights.device) for rows, weights in pairs)
        return TableOutputs(gains, offsets)


@dataclass(frozen=True, slots=True)
class TableOutputs:
    """A table on the device: Terms of all modules at once, [terms, n, modules]."""

    gains: Terms
    offsets: Terms

    def apply(self, number: int, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Scale and shift module ``number``'s ``out`` [n, o]; to rows without terms what they had is written."""
        gains, offsets = (_of_module(terms, number) for terms in (self.gains, self.offsets))
        before = out.float()
        after = changed(before, bias, b, gains, offsets)
        touched = [(terms.weights != 0).any(dim=0) for terms in (gains, offsets) if terms is not None]
        if touched:
            out.copy_(
                torch.where(touched[0] if len(touched) == 1 else touched[0] | touched[1], after, before)
            )


def _of_module(terms: Terms, number: int) -> Terms | None:
    if not len(terms.rows):
        return None
    return Terms(terms.rows[:, :, number], terms.weights[:, :, number, None])
