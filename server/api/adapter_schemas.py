"""Bodies of the routes that manage adapters and mixtures: ours, and vLLM's two by its names."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from manylora.adapters.manifest import MAX_DESCRIPTION, MAX_EXAMPLE, MAX_EXAMPLES
from manylora.adapters.mixtures import MixturePart
from manylora.server.api.inert import LOAD, Passing, refused
from manylora.server.api.mixture_fields import MAX_PARTS, NamedPart
from manylora.server.api.strict import Strict

Source = Annotated[str, Field(min_length=1, max_length=4096)]
Example = Annotated[str, Field(min_length=1, max_length=MAX_EXAMPLE)]
Examples = Annotated[list[Example], Field(max_length=MAX_EXAMPLES, fail_fast=True)]
Parts = Annotated[list[NamedPart], Field(max_length=MAX_PARTS, fail_fast=True)]
Version = Annotated[int, Field(ge=1, le=999_999_999)]
FormField = Literal["text", "flag", "number"]
"""What a form says beside its files; a flag may be left out."""


class AdapterWords(Strict):
    """PATCH /adapters/{name}: what is said of an adapter, over what its files say. What isn't named stays."""

    description: str | None = Field(None, max_length=MAX_DESCRIPTION, description="What the adapter is for.")
    examples: Examples | None = Field(
        None, description="Prompts of the kind that are its own, for the model auto. []: it is never chosen."
    )
    threshold: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="How near a prompt must be to its examples; none: --auto-threshold.",
    )

    @property
    def words(self) -> dict[str, object]:
        """Those that were given."""
        told = {name: getattr(self, name) for name in AdapterWords.model_fields}
        return {name: value for name, value in told.items() if value is not None}


class Offered(Strict):
    """A body that may say where an adapter is read from. A form brings the adapter instead, after ``form``'s fields."""

    form: ClassVar[Mapping[str, FormField]] = {}

    src: Source | None = Field(
        None,
        description="What an adapter is read from: a directory below --adapter-root, a file:// URL of one, or, as "
        "far as --allow-source lets it, org/name of the hub (hf://org/name@revision), s3://, gs://, az://, https://.",
    )
    token: str | None = Field(
        None,
        min_length=1,
        max_length=4096,
        pattern=r"^[!-~]+$",
        description="Opens src on the hub, or where https:// leads; it is used for that and not kept.",
    )


class AdapterUpdate(AdapterWords, Offered):
    """PUT /adapters/{name}: an adapter by ``src``, or a mixture by its parts."""

    form: ClassVar[Mapping[str, FormField]] = {"preload": "flag", "pin": "flag"}

    mixture: Parts = Field(
        default_factory=list, description="Adapters with weights: what a mixture is made of."
    )
    preload: bool | None = Field(None, description="Put the adapter on the device now, and at each start.")
    pin: bool | None = Field(None, description="Keep the adapter on the device.")

    @model_validator(mode="after")
    def _one_of_two(self) -> "AdapterUpdate":
        if (self.src is None) == (not self.mixture):
            raise ValueError("give either src, for an adapter, or mixture, a list of at least one part")
        if self.mixture:
            for name in ("preload", "pin", "token", *self.words):
                if name in self.words or getattr(self, name):
                    raise refused(
                        name, "goes with src: a mixture has no weights of its own, ask it of its parts"
                    )
        return self

    @property
    def parts(self) -> tuple[MixturePart, ...]:
        """The mixture's parts; () for an adapter."""
        return tuple(part.part for part in self.mixture)


class AdapterRequest(AdapterUpdate):
    """POST /adapters: an adapter by ``src``, or a mixture by its parts."""

    form: ClassVar[Mapping[str, FormField]] = {"name": "text", **AdapterUpdate.form}

    name: str = Field(min_length=1)


class CanaryRequest(Offered):
    """POST /adapters/{name}/canary: a version that is kept, or a new one by ``src``."""

    form: ClassVar[Mapping[str, FormField]] = {"share": "number"}

    version: Version | None = Field(None, description="One that is kept, or the canary that is.")
    share: float = Field(ge=0, le=1, allow_inf_nan=False, description="Of the requests for the name.")

    @model_validator(mode="after")
    def _one_of_two(self) -> "CanaryRequest":
        if (self.src is None) == (self.version is None):
            raise ValueError("give either version, one that is kept, or src, for a new one")
        if self.token is not None and self.src is None:
            raise refused("token", "goes with src: a version that is kept is here already")
        return self


class LoadLoraRequest(Strict):
    """POST /v1/load_lora_adapter, with vLLM's names."""

    passing: ClassVar[Passing] = LOAD

    lora_name: str = Field(min_length=1)
    lora_path: Source
    load_inplace: bool = Field(False, description="Replace what has the name already.")
    base_model_name: str = Field(
        "", description="The base that the adapter is for; empty: whichever is served."
    )


class UnloadLoraRequest(Strict):
    """POST /v1/unload_lora_adapter, with vLLM's names."""

    lora_name: str = Field(min_length=1)
    lora_int_id: int | None = None
