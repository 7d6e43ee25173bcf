"""Holds a merged model's files against base + adapter, before anyone sees them.

One forward pass computes, side by side: base + adapter with the adapter beside the weights, as it is served; the base
alone; the merged model from its new files; and the merge into the other base, so that both can be compared with what
is served.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from manylora.adapters.export.base import BaseCheckpoint, ServedAsNf4
from manylora.adapters.export.compare import (
    FOUR_BIT_RATIO,
    FOUR_BIT_TOLERANCE,
    TOLERANCE,
    Distance,
    Losses,
    check_distance,
    check_losses,
    distance,
)
from manylora.adapters.export.forward import Outputs, Plain, Variant, run_variants
from manylora.adapters.export.merge import MergedWeights
from manylora.adapters.export.nf4_layout import quantize_rows
from manylora.adapters.export.outline import EMBEDDING
from manylora.adapters.export.plan import MergePlan
from manylora.adapters.export.rows import PackedRows, RoundedRows, Rows
from manylora.adapters.export.samples import built_in_rows, sample_rows
from manylora.adapters.export.write import OutputForm

MERGED, BASE, REQUANTISED = "merged", "base", "merged, in NF4"
"""Names of variants; "16bit" and "dequantized" are base + adapter, "other" the merge that was not asked for."""
OTHER = "other"


@dataclass(frozen=True, slots=True)
class Checked:
    """What was measured."""

    logits: Distance
    """The merged model from base + adapter, on the base that was merged into."""
    tolerance: float
    positions: int
    effect: Distance
    """Base + adapter from the base alone: what the adapter does."""
    from_served: Mapping[str, Distance]
    """Of the merges into either base, as far as they can be made, from what is served."""
    losses: Losses | None
    in_nf4: Distance | None
    """Of the merged model rounded to NF4 from itself; None if it is NF4 already."""

    @property
    def nearer(self) -> str:
        """Which merge is nearer to what is served."""
        return min(self.from_served, key=lambda into: self.from_served[into].relative)


def verify(
    plan: MergePlan,
    merged: Path,
    config: Mapping[str, object],
    samples: Path | None,
    progress: Callable[[float], None],
) -> Checked:
    """Measure the model in ``merged``, whose config.json is ``config``. Raises ExportFailed if it does not pass."""
    vocab_size = plan.shapes[EMBEDDING][0]
    rows = built_in_rows(merged, vocab_size)
    if samples is not None:
        rows += sample_rows(samples, merged, vocab_size)
    variants: dict[str, Variant] = {into: plan.merged(into) for into in plan.weights}
    variants[BASE] = Plain(plan.unadapted)
    others = [into for into in plan.weights if into != plan.into]
    if others:
        other = plan.merged(others[0])
        variants[OTHER] = Plain(lambda name: _as_written(name, other, plan.form))
    variants[MERGED] = Plain(BaseCheckpoint(merged).rows)
    if not plan.form.four_bit:
        variants[REQUANTISED] = Plain(_in_nf4(plan, BaseCheckpoint(merged)))
    computed = run_variants(config, variants, rows, progress)
    return _judge(plan, computed)


def _in_nf4(plan: MergePlan, merged: BaseCheckpoint) -> Callable[[str], Rows]:
    """Return the merged model's parameters as they would be if it were quantised after all."""
    served = ServedAsNf4(merged, plan.outline.linears, plan.form.dtype, double_quant=plan.forms.double_quant)
    return served.rows


def _as_written(name: str, merged: MergedWeights, form: OutputForm) -> Rows:
    """Return a merged parameter as the file would hold it."""
    if name in form.four_bit:
        return PackedRows(quantize_rows(merged.rows(name), form.dtype, double_quant=form.double_quant))
    return RoundedRows(merged.rows(name), form.dtype)


def _tolerance(plan: MergePlan, computed: Mapping[str, Outputs]) -> float:
    if not plan.form.four_bit:
        return TOLERANCE[plan.form.dtype]
    if len(plan.weights) == 1:
        return FOUR_BIT_TOLERANCE
    rounding = distance(computed["16bit"].logits, computed["dequantized"].logits)
    return max(FOUR_BIT_TOLERANCE, FOUR_BIT_RATIO * rounding.relative)


def _judge(plan: MergePlan, computed: Mapping[str, Outputs]) -> Checked:
    reference, result = computed[plan.into], computed[MERGED]
    tolerance = _tolerance(plan, computed)
    found = distance(reference.logits, result.logits)
    check_distance(found, tolerance)
    served = computed[plan.served].logits
    from_served = {plan.into: distance(served, result.logits)}
    for into in plan.weights:
        if into != plan.into:
            from_served[into] = distance(served, computed[OTHER].logits)
    losses = None
    if reference.loss is not None and result.loss is not None:
        base = computed[BASE].loss
        assert base is not None
        losses = Losses(base, reference.loss, result.loss)
        check_losses(losses)
    effect = distance(computed[BASE].logits, reference.logits)
    in_nf4 = distance(result.logits, computed[REQUANTISED].logits) if REQUANTISED in computed else None
    return Checked(found, tolerance, len(reference.logits), effect, from_served, losses, in_nf4)
