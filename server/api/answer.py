"""The ground of every object that routes answer with, for /openapi.json."""

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    """An object that may grow more fields."""

    model_config = ConfigDict(extra="allow", json_schema_serialization_defaults_required=True)
