"""The ground of every request body: no unknown fields, no silent conversions; null is the same as left out."""

from functools import cache
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from manylora.server.api.inert import BODY, Passing


class Strict(BaseModel):
    """A request body: no unknown fields, no silent conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    passing: ClassVar[Passing] = BODY

    @classmethod
    @cache
    def read_names(cls) -> frozenset[str]:
        """Return the names of the fields that are read."""
        return frozenset(field.alias or name for name, field in cls.model_fields.items())

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError("Input should be an object")
        asked = {}
        read = cls.read_names()
        for key, item in value.items():
            if key not in read:
                cls.passing.check(key, item, read)
            elif item is not None:
                asked[key] = item
        return asked
