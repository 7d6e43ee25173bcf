"""Writes the merged weights, a matrix at a time, and measures how much of each change survived the rounding."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor

from manylora.adapters.export.errors import ExportFailed
from manylora.adapters.export.merge import MergedWeights
from manylora.adapters.export.nf4_layout import nf4_entries, nf4_tensors, quantize_rows
from manylora.adapters.export.rows import PackedRows, chunks
from manylora.adapters.export.safetensors_writer import Entry, ShardedWriter
from manylora.quant.nf4 import Nf4Tensor

LEAST_KEPT = 0.8
"""Share of the whole change that must be in the result."""
LEAST_KEPT_OF_A_LAYER = 0.5
"""The same for each parameter whose change is not negligible beside the others."""
NEGLIGIBLE = 0.1
"""Of the mean square of all changes."""


@dataclass(frozen=True, slots=True)
class Survival:
    """What became of one parameter's change Δ when base + Δ was rounded: written − base beside Δ."""

    norm: float
    """‖Δ‖, Frobenius."""
    kept: float
    """⟨written − base, Δ⟩ / ‖Δ‖²: 1 if all of it is there, 0 if it was rounded away."""
    error: float
    """‖written − base − Δ‖ / ‖Δ‖: what rounding added, the rounding of the base's own weights included."""


class Tally:
    """What became of one parameter's change, summed over chunks: float32 in a chunk, float64 over them."""

    def __init__(self) -> None:
        self._square = self._along = self._off = 0.0

    def add(self, base: Tensor, exact: Tensor, written: Tensor) -> None:
        """Take in the same rows of the base, of base + change, and of what was written, float32."""
        change, off = (exact - base).view(-1), (written - exact).view(-1)
        square = torch.dot(change, change).item()
        self._square += square
        self._along += square + torch.dot(off, change).item()
        self._off += torch.dot(off, off).item()

    def survival(self) -> Survival | None:
        """Return the result; None for a change of nothing."""
        if self._square == 0:
            return None
        return Survival(sqrt(self._square), self._along / self._square, sqrt(self._off / self._square))


@dataclass(frozen=True, slots=True)
class OutputForm:
    """How the merged weights are stored."""

    dtype: torch.dtype
    four_bit: frozenset[str] = frozenset()
    """Parameters that become NF4."""
    double_quant: bool = False

    def entries(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Entry]:
        """Return the tensors of all files, in the model's order."""
        entries: list[Entry] = []
        for name, shape in shapes.items():
            if name in self.four_bit:
                entries += nf4_entries(name, shape, double_quant=self.double_quant)
            else:
                entries.append(Entry(name, self.dtype, shape))
        return entries


def write_weights(
    directory: Path,
    merged: MergedWeights,
    shapes: Mapping[str, tuple[int, ...]],
    form: OutputForm,
    shard_bytes: int,
    progress: Callable[[float], None],
) -> dict[str, Survival]:
    """Write all parameters into ``directory`` and return what survived, by parameter; ``progress`` goes from 0 to 1."""
    writer = ShardedWriter(directory, form.entries(shapes), shard_bytes)
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    done = 0
    survived: dict[str, Survival] = {}
    for name, shape in shapes.items():
        tally = Tally()
        if name in form.four_bit:
            _write_nf4(writer, name, merged, form, tally)
        else:
            writer.write(name, _rounded(merged, name, form.dtype, tally))
        found = tally.survival()
        if found is not None:
            survived[name] = found
        done += torch.Size(shape).numel()
        progress(done / total)
    writer.finish()
    return survived


def _rounded(merged: MergedWeights, name: str, dtype: torch.dtype, tally: Tally) -> Iterator[Tensor]:
    source, change = merged.unchanged(name), merged.change(name)
    for first, last in chunks(source.shape):
        base = source.rows(first, last)
        exact = base if change is None else change.on(base, slice(first, last))
        written = exact.to(dtype)
        if not bool(torch.isfinite(written).all()):
            raise ExportFailed(
                f"{name} overflows {dtype} once merged; merge with --dtype bfloat16 or float32"
            )
        if change is not None:
            tally.add(base, exact, written.float())
        yield written


def _write_nf4(
    writer: ShardedWriter, name: str, merged: MergedWeights, form: OutputForm, tally: Tally
) -> None:
    try:
        matrix = quantize_rows(merged.rows(name), form.dtype, double_quant=form.double_quant)
    except ValueError as error:
        raise ExportFailed(f"{name} can't be quantised once merged: {error}") from None
    for tensor, value in nf4_tensors(name, matrix, form.dtype).items():
        writer.write(tensor, [value])
    _tally_nf4(name, merged, matrix, tally)


def _tally_nf4(name: str, merged: MergedWeights, matrix: Nf4Tensor, tally: Tally) -> None:
    source, change = merged.unchanged(name), merged.change(name)
    if change is None:
        return
    held = PackedRows(matrix)
    for first, last in chunks(source.shape):
        base = source.rows(first, last)
        tally.add(base, change.on(base, slice(first, last)), held.rows(first, last))


def survival_in_nf4(merged: MergedWeights, form: OutputForm) -> dict[str, Survival]:
    """Return what would survive in NF4, by parameter; writes nothing."""
    survived: dict[str, Survival] = {}
    for name in form.four_bit:
        if merged.change(name) is not None:
            tally = Tally()
            matrix = quantize_rows(merged.rows(name), form.dtype, double_quant=form.double_quant)
            _tally_nf4(name, merged, matrix, tally)
            found = tally.survival()
            survived |= {} if found is None else {name: found}
    return survived


def share_kept(survived: Mapping[str, Survival]) -> float:
    """Return the share of the whole change that is in the result; 1 if there was none."""
    square = sum(each.norm**2 for each in survived.values())
    return 1.0 if square == 0 else sum(each.kept * each.norm**2 for each in survived.values()) / square


def share_exact(survived: Mapping[str, Survival]) -> float:
    """Return 1 − ‖written − base − Δ‖² / ‖Δ‖² over all, 0 at least: what rounding adds counts as lost, too."""
    square = sum(each.norm**2 for each in survived.values())
    off = sum((each.error * each.norm) ** 2 for each in survived.values())
    return 1.0 if square == 0 else max(0.0, 1 - off / square)


def check_survival(survived: Mapping[str, Survival], remedy: Callable[[], str]) -> None:
    """Raise ExportFailed if the change was rounded away, over all or in a parameter where it matters.

    ``remedy`` says what keeps it, and is asked only then.
    """
    square = sum(each.norm**2 for each in survived.values())
    lost = [
        (each.kept, name)
        for name, each in survived.items()
        if each.kept < LEAST_KEPT_OF_A_LAYER and each.norm**2 > NEGLIGIBLE * square / len(survived)
    ]
    if share_kept(survived) < LEAST_KEPT:
        raise ExportFailed(
            f"rounding took away the adapter's change: {share_kept(survived):.0%} of it is left; {remedy()}"
        )
    if lost:
        kept, name = min(lost)
        raise ExportFailed(
            f"rounding took away the change of {len(lost)} parameters ({name} keeps {kept:.0%}); {remedy()}"
        )
