"""What is asked to be exported, and what that means at this moment: versions of adapters, and their weights."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from manylora.adapters.mixtures import MixturePart, spell
from manylora.adapters.records import AdapterRecord
from manylora.server.api.asked_models import told_of
from manylora.server.api.dependencies import ApiDependencies
from manylora.server.api.export_jobs import ExportedPart, ExportSource
from manylora.server.api.inert import refused
from manylora.server.api.mixture_fields import MAX_PARTS, NamedPart
from manylora.server.api.strict import Strict
from manylora.server.catalog import ResolvedModel
from manylora.server.errors import InvalidRequest

OFFLINE = ("ties", "dare_ties", "dare_linear")


class ExportRequest(Strict):
    """POST /adapters/{name}/export."""

    format: Literal["merged", "merged-4bit", "peft"] = Field(
        "merged", description="A whole checkpoint, the same in NF4, or the adapter alone as an archive."
    )
    base: Literal["auto", "16bit", "dequantized"] = Field(
        "auto", description="Merge into the base's 16-bit weights, or its 4-bit ones as served."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="auto: the base's; float32 for an adapter that is made of a mixture."
    )
    combine: Literal["cat", "svd"] | None = Field(
        None, description="How format peft makes one adapter of a mixture: cat, the sum itself, if not given."
    )
    rank: int | None = Field(None, ge=1, description="Of svd: the largest rank of the result.")

    @field_validator("combine", mode="before")
    @classmethod
    def _here(cls, value: Any) -> Any:
        if value in OFFLINE:
            raise ValueError(
                f"{value!r} isn't done on a server: `manylora merge --combine {value}` makes an adapter by it"
            )
        return value

    @model_validator(mode="after")
    def _that_go_together(self) -> "ExportRequest":
        if self.combine is not None and self.format != "peft":
            raise refused("combine", "goes with format peft: a merged model is always the sum itself")
        if self.combine == "svd" and self.rank is None:
            raise refused("rank", "is missing: svd needs the wanted rank")
        if self.rank is not None and self.combine != "svd":
            raise refused("rank", "goes with combine svd: the rank of cat is the sum of the parts' ranks")
        return self


class MixtureExportRequest(ExportRequest):
    """POST /exports: of an adapter or a mixture by name or text, or of a mixture by its parts."""

    model: str | None = Field(
        None, min_length=1, description="An adapter or a mixture: by its name, or as sql:0.7+pirate:0.3."
    )
    mixture: Annotated[list[NamedPart], Field(max_length=MAX_PARTS, fail_fast=True)] = Field(
        default_factory=list, description="Adapters with weights."
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> "MixtureExportRequest":
        if (self.model is None) == (not self.mixture):
            raise ValueError(
                "give either model, a name or a text such as sql:0.7+pirate:0.3, or mixture, a list of parts"
            )
        return self


def source_of_name(deps: ApiDependencies, name: str, combine: str | None) -> ExportSource:
    """Return the version of an adapter that its name means now, or a named mixture's parts. Raises UnknownAdapter."""
    if deps.catalog.kind_of(name) == "mixture":
        return _source(deps, deps.catalog.resolve(name), combine)
    return _of_adapter(deps.catalog.get(name).record, combine)


async def source_of(deps: ApiDependencies, body: MixtureExportRequest) -> ExportSource:
    """Return what a body asks for. Raises what AdapterCatalog.resolve and ModelTexts.of raise, naming the field."""
    param = "model" if body.model is not None else "mixture"
    parts = tuple(part.part for part in body.mixture)
    with told_of(param):
        found = deps.catalog.resolve(body.model or deps.settings.base_model, parts)
        source = _source(deps, found, body.combine)
        if found.part_texts:  # parts with tokenizers of their own, which must be one and the same
            await deps.texts.of(found.text, found.digest, found.part_texts)
    return source


def _source(deps: ApiDependencies, found: ResolvedModel, combine: str | None) -> ExportSource:
    """Return a model's parts with the files that are theirs now; the loop is not left between the two."""
    if not found.adapters:
        what = "every weight is 0" if found.parts else f"{found.name[:200]!r} is the base"
        raise InvalidRequest(f"{what}: there is nothing to export", param="model")
    if len(found.poolings) > 1:
        raise InvalidRequest(
            "the mixture's adapters pool texts in different ways, last and mean, and what is exported says one:"
            " give them the same 1_Pooling/config.json, or take it out of one",
            param="model",
        )
    if not found.parts:
        return _of_adapter(deps.catalog.get(found.name).record, combine)
    parts = tuple(
        _part(deps.catalog.get(part.name).record, part.weight) for part in found.parts if part.weight != 0
    )
    entry = deps.catalog.get_mixture(found.name)
    if entry is not None:
        return ExportSource(entry.record.name, entry.record.version, None, parts)
    text = spell([MixturePart(part.adapter, part.weight) for part in parts])
    return ExportSource(text, None, None, parts)


def _of_adapter(record: AdapterRecord, combine: str | None) -> ExportSource:
    """Return one adapter; one that is to be combined is a mixture of itself."""
    parts = () if combine is None else (_part(record, 1.0),)
    return ExportSource(record.name, record.version, record.digest, parts)


def _part(record: AdapterRecord, weight: float) -> ExportedPart:
    return ExportedPart(record.name, record.version, record.digest, weight)
