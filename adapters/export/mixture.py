"""Several adapters with weights as one change: Δ = Σ wᵢ Δᵢ, as it is served, with nothing multiplied out.

A part is LoRA or DoRA of linear layers, each with its own rank, α, rule and targets. What is more (whole tensors,
embedding and head) is refused by the part's name, and so is DoRA where the result is to be factors alone: its Δ has the
base's own rows in it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from manylora.adapters.errors import AdapterError
from manylora.adapters.export.change import MAGNITUDE, PREFIX, Factors, TrainedAdapter
from manylora.adapters.export.errors import ExportRefused
from manylora.adapters.export.matrix_change import Change, FactorChange, SumOfChanges
from manylora.adapters.export.outline import EMBEDDING, HEAD, ModelOutline
from manylora.adapters.export.settings import ExportPart
from manylora.adapters.files import WEIGHTS_FILE, present_files
from manylora.adapters.header import read_header
from manylora.adapters.invocation import refuse_merging
from manylora.adapters.mixtures import MixturePart, spell
from manylora.adapters.reader import MAX_ADAPTER_BYTES

_SUM = "a mixture is a sum of LoRA factors of linear layers"
_DORA = (
    "is DoRA, which gives the base's own rows other lengths, and one adapter made of a mixture is a sum of factors:"
    " --format merged makes a model of it"
)
_HALVES = (".lora_A.weight", ".lora_B.weight")


class TrainedMixture:
    """The parts of a mixture, held against the base that ``outline`` describes; parts of weight 0 are left out.

    The order in which they are given has no say: the same parts give the same numbers. Raises ExportRefused for a
    part that is more than factors, AdapterError for one that doesn't fit, both with its name.
    """

    keeps_tied = False
    replaced: tuple[str, ...] = ()

    def __init__(self, parts: Sequence[ExportPart], outline: ModelOutline) -> None:
        self._asked = [part for part in parts if part.weight != 0]
        read = [(part, _adapter(part, outline)) for part in self._asked]
        read.sort(key=lambda pair: (pair[1].digest, pair[0].weight, pair[0].name))
        self.parts = tuple(part for part, _ in read)
        """In one order, whatever they are called and however they were given."""
        self.adapters = tuple(adapter for _, adapter in read)
        changed = {name for adapter in self.adapters for name in adapter.changed}
        self.changed = tuple(name for name in outline.shapes if name in changed)

    @property
    def method(self) -> str:
        """What it is, in words."""
        return f"mixture of {len(self.parts)}: {self.text}"

    @property
    def text(self) -> str:
        """The mixture as text, in the order that was given."""
        return spell([MixturePart(part.name, part.weight) for part in self._asked])

    def describe(self) -> dict[str, object]:
        """Return what a manifest says of it."""
        by_part = dict(zip(self.parts, self.adapters, strict=True))
        parts = [
            {"name": part.name, "weight": part.weight, **by_part[part].describe()} for part in self._asked
        ]
        return {"method": self.method, "parts": parts}

    def touches(self, name: str) -> bool:
        """Whether it changes a parameter at all."""
        return name in self.changed

    def shape_of(self, name: str) -> None:
        """Return None: no part brings a parameter whole."""

    def whole(self, name: str) -> Tensor | None:
        """Return None: no part brings a parameter whole."""
        return None

    def check_factors(self) -> None:
        """Raise ExportRefused, with the part's name, unless the sum is one of factors and nothing else."""
        for part, adapter in zip(self.parts, self.adapters, strict=True):
            if adapter.spec.use_dora:
                raise ExportRefused(f"part {part.name!r} {_DORA}")

    def factors(self, name: str) -> list[Factors]:
        """Return the pairs of a parameter that are added as they are, each part's weight in its scale."""
        found = [
            (part.weight, adapter.factors(name))
            for part, adapter in zip(self.parts, self.adapters, strict=True)
            if not adapter.spec.use_dora
        ]
        return [Factors(pair.a, pair.b, pair.scale * weight) for weight, pair in found if pair is not None]

    def ranks_of(self, name: str) -> list[int]:
        """Return the rank of each part that adds to a parameter."""
        path = name.removesuffix(".weight")
        return [adapter.spec.rank_of(path) for adapter in self.adapters if adapter.touches(name)]

    def change(self, name: str) -> Change | None:
        """Return what is done to a parameter, if anything: the parts' factors side by side, never averaged."""
        found = self.factors(name)
        plain = stacked(found) if found else None
        scaled = [
            (part.weight, change)
            for part, adapter in zip(self.parts, self.adapters, strict=True)
            if adapter.spec.use_dora and (change := adapter.change(name)) is not None
        ]
        if not scaled:
            return plain
        return SumOfChanges(scaled if plain is None else [(1.0, plain), *scaled])


def stacked(factors: Sequence[Factors]) -> FactorChange:
    """Return Σ scale · b a as one pair, exact but for float32: a row on row, b column by column."""
    return FactorChange(
        torch.cat([each.a for each in factors]),
        torch.cat([each.b * each.scale for each in factors], dim=1),
    )


def outline_of_parts(parts: Sequence[ExportPart]) -> ModelOutline:
    """Return as much of a base as the parts' files tell: the linear layers that they have factors for, by name.

    Raises AdapterError, with the part's name, for files that can't be read or that contradict each other.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for part in parts:
        for name, shape in _shapes(part).items():
            if shapes.setdefault(name, shape) != shape:
                raise ExportRefused(
                    f"{part.name!r} is for another base than the parts before it: {name} has shape {list(shape)} there,"
                    f" and {list(shapes[name])} here"
                )
    return ModelOutline(
        dict(sorted(shapes.items(), key=lambda item: natural(item[0]))), frozenset(shapes), tied=False
    )


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a key that sorts layer 2 before layer 10."""
    return tuple(
        (0, int(word), "") if word.isascii() and word.isdigit() else (1, 0, word) for word in name.split(".")
    )


def _shapes(part: ExportPart) -> dict[str, tuple[int, ...]]:
    try:
        present_files(part.directory, MAX_ADAPTER_BYTES)
        entries = read_header(part.directory / WEIGHTS_FILE)
    except AdapterError as error:
        raise _of_part(part, error) from None
    first, second = _HALVES
    for name in entries:
        if MAGNITUDE.search(name):
            raise ExportRefused(f"part {part.name!r} {_DORA}")
        if not name.endswith(_HALVES):
            raise ExportRefused(f"part {part.name!r} has {name}: {_SUM}")
    pairs = {name.removesuffix(first): entry.shape for name, entry in entries.items() if name.endswith(first)}
    return {
        f"{path.removeprefix(PREFIX)}.weight": (entries[path + second].shape[0], wide[1])
        for path, wide in pairs.items()
        if path + second in entries and len(wide) == len(entries[path + second].shape) == 2
    }


def _adapter(part: ExportPart, outline: ModelOutline) -> TrainedAdapter:
    try:
        adapter = TrainedAdapter(part.directory, outline)
        refuse_merging(adapter.spec.invocation)
    except AdapterError as error:
        raise _of_part(part, error) from None
    what = _beyond_factors(adapter)
    if what is not None:
        raise ExportRefused(f"part {part.name!r} {what}: {_SUM}")
    return adapter


def _beyond_factors(adapter: TrainedAdapter) -> str | None:
    """Return what an adapter has or is that can't be mixed, if there is anything."""
    for name in (EMBEDDING, HEAD):
        if adapter.touches(name):
            return f"changes {name}"
    return f"brings {adapter.replaced[0]} whole" if adapter.replaced else None


def _of_part(part: ExportPart, error: AdapterError) -> AdapterError:
    error.message = f"part {part.name!r}: {error.message}"
    return error
