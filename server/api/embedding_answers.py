"""Answers of the routes that pool, as /openapi.json describes them. Nothing is built with these; see answers.py."""

from typing import Literal

from pydantic import ConfigDict, Field

from manylora.server.api.answer import Answer
from manylora.server.api.answers import ServedPart


class PooledUsage(Answer):
    """Tokens of a request that makes none."""

    prompt_tokens: int
    total_tokens: int


class Pooledlike(Answer):
    """What all of these share."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=False)

    model: str
    usage: PooledUsage
    adapters: list[ServedPart] = Field(default_factory=list, description="A mixture's parts.")


class Embedding(Answer):
    """The vector of one input."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="As numbers, or base64 of float32, little-endian.")


class Embeddings(Pooledlike):
    """A vector for each input, in order."""

    object: Literal["list"]
    data: list[Embedding]


class Score(Answer):
    """How near one pair of texts is."""

    object: Literal["score"]
    index: int
    score: float


class Scores(Pooledlike):
    """A score for each pair, in order."""

    id: str
    object: Literal["list"]
    created: int
    data: list[Score]


class RankedDocument(Answer):
    """A document as it was sent."""

    text: str


class Ranked(Answer):
    """How near one document is to the query."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=False)

    index: int = Field(description="Its place among the documents that were sent.")
    relevance_score: float
    document: RankedDocument | None = None


class Reranked(Pooledlike):
    """The documents, the nearest first."""

    id: str
    results: list[Ranked]
