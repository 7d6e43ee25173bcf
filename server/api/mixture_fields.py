"""Fields by which a request names several adapters with weights beside ``model``: ours, and LoRAX's.

Whether the adapters are there and go together is the catalog's to say; here is what one body alone can have wrong.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from manylora.adapters.mixtures import MixturePart
from manylora.server.api.inert import MERGED, PART_OF_MIXTURE, Passing, refused
from manylora.server.api.strict import Strict

MAX_PARTS = 64
"""Parts that a body may name at all; of them a server takes --max-mixture-parts, which is at most this."""
Weight = Annotated[float, Field(allow_inf_nan=False, description="Above 1 and below 0 too; 0 leaves it out.")]
Name = Annotated[str, Field(min_length=1)]


class AskedPart(Strict):
    """An adapter of a mixture that a request makes up."""

    passing: ClassVar[Passing] = PART_OF_MIXTURE

    name: Name
    weight: Weight = 1.0


class NamedPart(Strict):
    """An adapter of a mixture that has a name."""

    passing: ClassVar[Passing] = PART_OF_MIXTURE

    adapter: Name
    weight: Weight = 1.0

    @property
    def part(self) -> MixturePart:
        """It as the catalog takes it."""
        return MixturePart(self.adapter, self.weight)


class MergedAdapters(Strict):
    """LoRAX's way to name a mixture. Only what means a sum of the adapters is taken."""

    passing: ClassVar[Passing] = MERGED

    ids: Annotated[list[Name], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
    weights: Annotated[list[Weight], Field(max_length=MAX_PARTS, fail_fast=True)] = Field(
        default_factory=list, description="One for each of ids; none: 1 each."
    )
    merge_strategy: Literal["linear"] = "linear"

    @field_validator("merge_strategy", mode="before")
    @classmethod
    def _a_sum(cls, value: Any) -> Any:
        if value in ("ties", "dare_linear", "dare_ties"):
            raise ValueError(
                f"{value!r} isn't done for a request, 'linear' is; `manylora merge` makes an adapter by it"
            )
        return value

    @model_validator(mode="after")
    def _a_weight_each(self) -> "MergedAdapters":
        if self.weights and len(self.weights) != len(self.ids):
            raise refused("weights", f"there are {len(self.weights)} of them for {len(self.ids)} ids")
        return self

    @property
    def parts(self) -> tuple[MixturePart, ...]:
        """The mixture."""
        weights = self.weights or [1.0] * len(self.ids)
        return tuple(map(MixturePart, self.ids, weights))


class ModelFields(Strict):
    """What a request may say of the model beside its name."""

    adapters: Annotated[list[AskedPart], Field(max_length=MAX_PARTS, fail_fast=True)] = Field(
        default_factory=list, description="A mixture of adapters with weights; model then names the base."
    )
    merged_adapters: MergedAdapters | None = Field(None, description="The same in LoRAX's shape.")
    user: Any = Field(None, description="Who asks: of an adapter with a canary, one user gets one version.")
    safety_identifier: Any = Field(None, description="The same, by its newer name.")

    @model_validator(mode="after")
    def _one_mixture(self) -> "ModelFields":
        if self.adapters and self.merged_adapters is not None:
            raise refused(
                "merged_adapters", "doesn't go with adapters: both name the mixture, give one of them"
            )
        return self

    @property
    def parts(self) -> tuple[MixturePart, ...]:
        """The mixture asked for beside ``model``; () if there is none."""
        if self.merged_adapters is not None:
            return self.merged_adapters.parts
        return tuple(MixturePart(part.name, part.weight) for part in self.adapters)

    @property
    def asker(self) -> str | None:
        """Who asks, as far as the client says; what is no text says nothing."""
        return next(
            (said for said in (self.user, self.safety_identifier) if isinstance(said, str) and said), None
        )

    @property
    def model_param(self) -> str:
        """The field that says which adapters are meant."""
        if self.merged_adapters is not None:
            return "merged_adapters"
        return "adapters" if self.adapters else "model"
