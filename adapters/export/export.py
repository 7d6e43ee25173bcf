"""Makes an export: plans it, writes it beside its place, checks it, publishes it. The door of this room.

Memory: one tensor as it is stored, its rounded 4-bit form, and chunks; so about three times the largest tensor.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch

from manylora.adapters.export.archive import SUFFIXES, archived_files, write_archive
from manylora.adapters.export.companions import (
    copy_texts,
    dtype_name,
    merged_config,
    write_card,
    write_config,
    write_manifest,
)
from manylora.adapters.export.errors import ExportRefused
from manylora.adapters.export.gguf_file import GGUF_SUFFIX, write_gguf_lora
from manylora.adapters.export.mixed_adapter import plan_adapter, write_adapter
from manylora.adapters.export.narrowest import measure, narrowest, remedy
from manylora.adapters.export.outline import EMBEDDING
from manylora.adapters.export.plan import MergePlan, plan_merge
from manylora.adapters.export.publish import check_space, check_target, publishing, publishing_file
from manylora.adapters.export.settings import ExportSettings
from manylora.adapters.export.verify import Checked, verify
from manylora.adapters.export.write import (
    OutputForm,
    Survival,
    check_survival,
    share_kept,
    write_weights,
)
from manylora.adapters.files import present_files
from manylora.adapters.reader import MAX_ADAPTER_BYTES
from manylora.quant.served_form import SECTION, ServedForm

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of the whole that is done, 0 to 1."""
MEASURING, WRITING, CHECKING = "measuring", "writing", "checking"
MEASURING_SHARE, WRITING_SHARE = 0.2, 0.5
"""Of the whole, where the first two end."""
LONGEST_NAME = 100
"""Characters of an adapter's name, or a mixture's, that a file's or a directory's name takes up."""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was published."""

    output: Path
    manifest: Mapping[str, object]
    """Empty for an archive."""


def export(settings: ExportSettings, progress: Progress = lambda doing, share: None) -> ExportReport:
    """Make what ``settings`` ask for. Raises AdapterError or QuantError, and then there is nothing at the output."""
    check_target(settings.output)
    if settings.format == "peft":
        return _combined(settings, progress) if settings.parts else _archive(settings, progress)
    if settings.format == "gguf-lora":
        return _gguf_lora(settings, progress)
    if settings.output.name.endswith(SUFFIXES):
        raise ExportRefused(
            f"{settings.output}: a merged model is a directory, and that is an archive's name: give a directory's, or"
            " --format peft for an archive of the adapter alone"
        )
    plan = plan_merge(settings)
    kept: Mapping[torch.dtype, float] = {}
    if not plan.form.four_bit:
        kept = measure(
            plan.merged(plan.into), plan.shapes, lambda share: progress(MEASURING, MEASURING_SHARE * share)
        )
        if settings.dtype == "auto":
            plan = replace(plan, form=OutputForm(narrowest(kept, plan.base.dtype())))
    with publishing(settings.output) as partial:
        check_space(partial, sum(entry.nbytes for entry in plan.form.entries(plan.shapes)))
        manifest = _merge(plan, settings, kept, partial, progress)
    progress("done", 1.0)
    return ExportReport(settings.output, manifest)


def _merge(
    plan: MergePlan,
    settings: ExportSettings,
    kept: Mapping[torch.dtype, float],
    partial: Path,
    progress: Progress,
) -> Mapping[str, object]:
    config = merged_config(plan.base.config, plan.shapes, plan.form, tied=plan.head.tied)
    survived = write_weights(
        partial,
        plan.merged(plan.into),
        plan.shapes,
        plan.form,
        settings.shard_bytes,
        lambda share: progress(WRITING, MEASURING_SHARE + (WRITING_SHARE - MEASURING_SHARE) * share),
    )
    check_survival(survived, lambda: remedy(plan, kept))
    write_config(partial, config)
    rows = plan.shapes[EMBEDDING][0]
    copy_texts(plan.base.directory, plan.texts, partial, vocab_size=rows)
    checked = verify(
        plan,
        partial,
        config,
        settings.samples,
        lambda share: progress(CHECKING, WRITING_SHARE + (1 - WRITING_SHARE) * share),
    )
    shares = {dtype_name(dtype): share for dtype, share in kept.items()}
    if checked.in_nf4 is not None:
        write_config(partial, {**config, SECTION: _served_form(plan, shares, checked).section()})
    manifest = _manifest(plan, settings, survived, checked) | {"kept_by_dtype": shares}
    write_manifest(partial, manifest)
    write_card(
        partial,
        manifest,
        base=_base_name(plan, settings),
        adapter=settings.name,
        method=plan.adapter.method,
    )
    return manifest


def _served_form(plan: MergePlan, shares: Mapping[str, float], checked: Checked) -> ServedForm:
    moves = None if checked.in_nf4 is None else checked.in_nf4.relative
    return ServedForm(dtype_name(plan.form.dtype), shares, moves, checked.effect.relative)


def _manifest(
    plan: MergePlan, settings: ExportSettings, survived: Mapping[str, Survival], checked: Checked
) -> dict[str, object]:
    return {
        "manylora": version("manylora"),
        "format": settings.format,
        "into": plan.into,
        "because": plan.choice.because,
        "dtype": dtype_name(plan.form.dtype),
        "base": {
            "name": _base_name(plan, settings),
            "stored": plan.base.stored.kind,
            "trained_as": None if plan.forms.trained is None else str(plan.forms.trained),
            "served_as": plan.served,
            "notes": [*plan.base.notes, *plan.choice.notes],
        },
        "adapter": {"name": settings.name, **plan.adapter.describe()},
        "head": "tied" if plan.head.tied else "untied by this merge" if plan.head.untied else "its own",
        "logits": {**asdict(checked.logits), "tolerance": checked.tolerance, "positions": checked.positions},
        "adapter_effect": asdict(checked.effect),
        "served": {
            "distance": {into: asdict(found) for into, found in checked.from_served.items()},
            "nearer": checked.nearer,
        },
        "in_nf4": None if checked.in_nf4 is None else asdict(checked.in_nf4),
        "loss": None if checked.losses is None else asdict(checked.losses),
        "change_kept": share_kept(survived),
        "change": {name: asdict(each) for name, each in survived.items()},
        "replaced": list(plan.adapter.replaced),
        "versions": {"torch": torch.__version__, "transformers": version("transformers")},
    }


def _base_name(plan: MergePlan, settings: ExportSettings) -> str:
    return settings.base_name or plan.base.directory.resolve().name


def _combined(settings: ExportSettings, progress: Progress) -> ExportReport:
    """Make one adapter of a mixture: a directory, or an archive of it if the output is called like one."""
    plan = plan_adapter(settings)

    def made(directory: Path) -> Mapping[str, object]:
        return write_adapter(plan, settings, directory, lambda share: progress(WRITING, share))

    if settings.output.name.endswith(SUFFIXES):
        with publishing_file(settings.output) as path:
            directory = path.parent / "adapter"
            directory.mkdir()
            manifest = made(directory)
            write_archive(directory, path, _top(settings))
    else:
        with publishing(settings.output) as directory:
            manifest = made(directory)
    progress("done", 1.0)
    return ExportReport(settings.output, manifest)


def _gguf_lora(settings: ExportSettings, progress: Progress) -> ExportReport:
    """Make one file that llama.cpp loads beside the base; of a mixture by way of the one adapter that it becomes."""
    if not settings.output.name.endswith(GGUF_SUFFIX):
        raise ExportRefused(f"{settings.output}: the name of a gguf-lora ends in {GGUF_SUFFIX}")
    with publishing_file(settings.output) as path:
        manifest: dict[str, object] = {}
        adapter, begin = settings.adapter, 0.0
        if adapter is None:
            adapter, begin = path.parent / "adapter", 0.5
            adapter.mkdir()
            # Rounded once, when the file is written.
            exactly = replace(settings, dtype="float32")
            manifest |= write_adapter(
                plan_adapter(settings), exactly, adapter, lambda share: progress(WRITING, begin * share)
            )
        made = write_gguf_lora(
            adapter, settings, path, lambda share: progress(WRITING, begin + (1 - begin) * share)
        )
        manifest = {**made, **_of_mixture(manifest, made)} if manifest else made
    progress("done", 1.0)
    return ExportReport(settings.output, manifest)


def _of_mixture(combined: Mapping[str, object], made: Mapping[str, object]) -> dict[str, object]:
    """Return what the manifest of a mixture's file says otherwise: its parts, and how far they are from the sum."""
    told = {key: combined[key] for key in ("adapter", "combine", "density", "seed", "rank", "ranks", "error")}
    return {**told, "rounding": made["error"]}


def _archive(settings: ExportSettings, progress: Progress) -> ExportReport:
    if not settings.output.name.endswith(SUFFIXES):
        raise ExportRefused(f"{settings.output}: an archive's name ends in {', '.join(SUFFIXES)}")
    assert settings.adapter is not None
    nbytes = sum(present_files(settings.adapter, MAX_ADAPTER_BYTES).values())
    with publishing_file(settings.output) as path:
        check_space(path.parent, nbytes)
        write_archive(settings.adapter, path, _top(settings))
    progress("done", 1.0)
    return ExportReport(settings.output, {"format": "peft", "files": list(archived_files(settings.adapter))})


def _top(settings: ExportSettings) -> str:
    """Return the name of an archive's directory."""
    return settings.name.replace("/", "_")[:LONGEST_NAME]
