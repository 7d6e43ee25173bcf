"""Bodies of the routes that export: what is to be made, and of what."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from manylora.server.api.inert import refused
from manylora.server.api.mixture_fields import MAX_PARTS, NamedPart
from manylora.server.api.strict import Strict
from manylora.server.exports.job import ExportForm

OFFLINE = ("ties", "dare_ties", "dare_linear")


class ExportRequest(Strict):
    """POST /adapters/{name}/export."""

    format: Literal["merged", "merged-4bit", "peft", "gguf-lora"] = Field(
        "merged",
        description="A whole checkpoint, the same in NF4, the adapter alone as an archive, or as a file for llama.cpp.",
    )
    base: Literal["auto", "16bit", "dequantized"] = Field(
        "auto", description="Merge into the base's 16-bit weights, or its 4-bit ones as served."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="auto: the base's; float32 for an adapter that is made of a mixture."
    )
    combine: Literal["cat", "svd"] | None = Field(
        None,
        description="How formats peft and gguf-lora make one adapter of a mixture: cat, the sum itself, if not given.",
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
        if self.combine is not None and self.format not in ("peft", "gguf-lora"):
            raise refused(
                "combine", "goes with format peft or gguf-lora: a merged model is always the sum itself"
            )
        if self.combine == "svd" and self.rank is None:
            raise refused("rank", "is missing: svd needs the wanted rank")
        if self.rank is not None and self.combine != "svd":
            raise refused("rank", "goes with combine svd: the rank of cat is the sum of the parts' ranks")
        return self

    @property
    def form(self) -> ExportForm:
        """What is to be made."""
        return ExportForm(self.format, self.base, self.dtype, self.combine, self.rank)


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
