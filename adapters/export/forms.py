"""Which of a base's forms an adapter is merged into: the one that it was trained on, so that its answers stay.

The 16-bit weights, their NF4 codes and the dequantised ones of another 4-bit format are different bases. An adapter
from `manylora train` says on which it was trained; for one that doesn't, what is served is what counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from manylora.adapters.base_form import DENSE, NF4, BaseForm, read_base_form
from manylora.adapters.export.base import DTYPES, BaseCheckpoint
from manylora.adapters.export.errors import ExportRefused
from manylora.adapters.export.settings import ExportSettings
from manylora.quant.nf4 import DOUBLE_QUANT
from manylora.quant.served_form import served_form

SIXTEEN_BIT, DEQUANTIZED = "16bit", "dequantized"
_TRAINED_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Choice:
    """Which weights are merged into, and why."""

    into: str
    """16bit or dequantized."""
    because: str
    notes: tuple[str, ...] = ()
    """What whoever asked should know."""


@dataclass(frozen=True, slots=True)
class Forms:
    """How the base was held in training, as far as the adapters say, and how it is served."""

    trained: BaseForm | None
    served: str
    """16bit or dequantized."""
    double_quant: bool
    nf4_dtype: torch.dtype
    """What 16-bit weights are rounded to before they become NF4."""


def find_forms(settings: ExportSettings, base: BaseCheckpoint) -> Forms:
    """Return the forms of ``base``; what ``settings`` say goes first. Raises AdapterError for unreadable files."""
    parts = [part.directory for part in settings.parts if part.weight]
    trained = common_form(parts if settings.adapter is None else [settings.adapter])
    on_nf4 = trained is not None and trained.kind == NF4
    double_quant, dense = settings.double_quant, settings.served_dense
    if double_quant is None:
        double_quant = trained.double_quant if trained is not None and on_nf4 else DOUBLE_QUANT
    if dense is None:
        dense = served_form(base.config) is not None if trained is None else trained.kind == DENSE
    dtype = DTYPES.get(settings.served_dtype)
    if dtype is None and trained is not None and on_nf4:
        dtype = _TRAINED_DTYPES.get(trained.dtype or "")
    served = SIXTEEN_BIT if dense and base.is_dense else DEQUANTIZED
    return Forms(trained, served, double_quant, base.dtype() if dtype is None else dtype)


def common_form(adapters: Sequence[Path]) -> BaseForm | None:
    """Return the form that all of them were trained on; None if one doesn't say, or they differ."""
    found = [read_base_form(adapter) for adapter in adapters]
    first = found[0] if found else None
    if first is None or any(each is None or not first.is_like(each) for each in found):
        return None
    return first


def choose(
    settings: ExportSettings, forms: Forms, served: BaseCheckpoint, dense: BaseCheckpoint | None
) -> Choice:
    """Say what is merged into. Raises ExportRefused for 16-bit weights that aren't there."""
    kind, trained = served.stored.kind, forms.trained
    if settings.into == SIXTEEN_BIT and dense is None:
        raise ExportRefused(
            f"the base is {kind}, so there are no 16-bit weights at hand: give them (--base-16bit), or"
            " merge into the dequantised ones (--into dequantized)"
        )
    told = "the adapter doesn't say what it was trained on" if trained is None else f"trained on {trained}"
    if settings.into != "auto":
        return Choice(settings.into, f"as asked; {told}")
    if settings.format == "merged-4bit" and dense is not None:
        return Choice(SIXTEEN_BIT, "merged-4bit rounds again, and a change of 4-bit values snaps back")
    if dense is None:
        return Choice(DEQUANTIZED, f"the base has no others; {told}", _missing(trained, kind))
    if trained is None:
        return Choice(forms.served, f"what is served; {told}")
    if trained.kind == DENSE:
        return Choice(SIXTEEN_BIT, "as in training")
    if trained.kind == kind or (trained.kind == NF4 and served.is_dense):
        return Choice(DEQUANTIZED, "as in training")
    return Choice(forms.served, f"what is served; {told}", _missing(trained, kind))


def _missing(trained: BaseForm | None, kind: str) -> tuple[str, ...]:
    """Return a note if what the adapter was trained on isn't at hand."""
    if trained is None or trained.kind == kind:
        return ()
    where = (
        "give its 16-bit weights with --base-16bit" if trained.kind == DENSE else "give that one with --base"
    )
    return (f"the adapter was trained on the base in another form ({trained}): to keep its answers {where}",)
