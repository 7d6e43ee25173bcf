"""What will be merged into what: reads configs and headers, and refuses what can't be merged. Writes nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from manylora.adapters.export.base import DTYPES, BaseCheckpoint, BaseWeights, ServedAsNf4
from manylora.adapters.export.change import Changes, TrainedAdapter
from manylora.adapters.export.errors import ExportRefused
from manylora.adapters.export.forms import DEQUANTIZED, SIXTEEN_BIT, Choice, Forms, choose, find_forms
from manylora.adapters.export.merge import HeadPlan, MergedWeights, merged_shapes, plan_head
from manylora.adapters.export.mixture import TrainedMixture
from manylora.adapters.export.outline import EMBEDDING, HEAD, ModelOutline, outline_of
from manylora.adapters.export.rows import Rows
from manylora.adapters.export.settings import ExportSettings
from manylora.adapters.export.texts import check_texts
from manylora.adapters.export.write import OutputForm
from manylora.adapters.invocation import refuse_merging


@dataclass(frozen=True, slots=True)
class MergePlan:
    """A merge that can be made: both bases as far as they are at hand, and what will be written."""

    base: BaseCheckpoint
    """Merged into, when ``into`` is 16bit; the source of config and tokenizer in any case."""
    weights: Mapping[str, BaseWeights]
    """By "16bit" and "dequantized", those at hand."""
    forms: Forms
    choice: Choice
    outline: ModelOutline
    adapter: Changes
    texts: tuple[Path, ...]
    """Directories with the texts of the adapter, or of each part of a mixture: all go together."""
    head: HeadPlan
    shapes: Mapping[str, tuple[int, ...]]
    form: OutputForm

    @property
    def has_new_tokens(self) -> bool:
        """Whether the adapter brings an embedding of another size."""
        return self.shapes[EMBEDDING] != self.outline.shapes[EMBEDDING]

    @property
    def into(self) -> str:
        """Which of ``weights`` are merged into."""
        return self.choice.into

    @property
    def served(self) -> str:
        """Which of them the server computes with."""
        return self.forms.served

    def merged(self, into: str) -> MergedWeights:
        """Return the adapter on one of the bases."""
        return MergedWeights(self.weights[into], self.adapter, self.head)

    def unadapted(self, name: str) -> Rows:
        """Return a parameter of the base alone; with the adapter's embedding if that has another size."""
        if self.has_new_tokens and name in (EMBEDDING, HEAD):
            return self.merged(self.into).unchanged(name)
        return self.weights[self.into].rows(EMBEDDING if self.head.was_tied and name == HEAD else name)


def plan_merge(settings: ExportSettings) -> MergePlan:
    """Read configs and headers, and hold everything against each other. Raises AdapterError or QuantError."""
    if settings.base is None:
        raise ExportRefused("a merge needs the base's directory")
    served = BaseCheckpoint(settings.base)
    dense = served if served.is_dense else None
    if settings.base_16bit is not None:
        dense = BaseCheckpoint(settings.base_16bit)
    outline = outline_of(served.config)
    served.check_complete(outline)
    if dense is not None and dense is not served:
        _check_twin(dense, outline)
    forms = find_forms(settings, served)
    choice = choose(settings, forms, served, dense)
    base = dense if choice.into == SIXTEEN_BIT and dense is not None else served
    dtype = base.dtype() if settings.dtype == "auto" else DTYPES[settings.dtype]
    adapter, texts = _changes(settings, outline, served)
    head = plan_head(base, adapter, outline)
    form = OutputForm(dtype)
    if settings.format == "merged-4bit":
        form = OutputForm(dtype, outline.linears, forms.double_quant)
    weights: dict[str, BaseWeights] = {} if dense is None else {SIXTEEN_BIT: dense}
    weights[DEQUANTIZED] = served
    if served.is_dense:
        weights[DEQUANTIZED] = ServedAsNf4(
            served, outline.linears, forms.nf4_dtype, double_quant=forms.double_quant
        )
    shapes = merged_shapes(outline, adapter, head)
    return MergePlan(base, weights, forms, choice, outline, adapter, texts, head, shapes, form)


def _changes(
    settings: ExportSettings, outline: ModelOutline, served: BaseCheckpoint
) -> tuple[Changes, tuple[Path, ...]]:
    if settings.adapter is not None:
        adapter = TrainedAdapter(settings.adapter, outline)
        refuse_merging(adapter.spec.invocation)
        return adapter, (settings.adapter,)
    mixture = TrainedMixture(settings.parts, outline)
    check_texts(mixture.parts, served.directory)
    return mixture, tuple(part.directory for part in mixture.parts)


def _check_twin(dense: BaseCheckpoint, outline: ModelOutline) -> None:
    if not dense.is_dense:
        raise ExportRefused(f"{dense.directory} is {dense.stored.kind}, not 16-bit")
    found = outline_of(dense.config)
    if found.shapes != outline.shapes:
        raise ExportRefused(f"{dense.directory} is another model than the base: their parameters differ")
    dense.check_complete(found)
