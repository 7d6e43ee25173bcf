"""Requests to pool texts, as clients may send them: OpenAI's embeddings, and scores and ranks as vLLM, Jina and Cohere
have them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field, field_validator, model_validator

from manylora.server.api.inert import BODY, Passing, refused
from manylora.server.api.mixture_fields import ModelFields
from manylora.server.api.schemas import Texts, TokenIdLists, TokenIds
from manylora.server.api.strict import Strict

MAX_INPUTS = 2048
"""As OpenAI has it."""
Input: TypeAlias = str | list[int]
POOLING = replace(
    BODY,
    inert={
        **BODY.inert,
        "truncate_prompt_tokens": (-1,),
        "softmax": (True, False),
        "activation": (True, False),
        "use_activation": (True, False),
        "embed_dtype": ("float32",),
        "endianness": ("native", "little"),
        "truncate": ("NONE",),
    },
    unserved={
        **BODY.unserved,
        "messages": "give texts as input",
        "truncate_prompt_tokens": "texts are not cut: send what fits the context",
        "truncate": "texts are not cut: send what fits the context",
        "max_tokens_per_doc": "documents are not cut: send what fits the context",
        "max_chunks_per_doc": "documents are not taken in chunks",
        "embed_dtype": "vectors are float32",
        "endianness": "vectors are little-endian",
        "embedding_types": "give encoding_format, float or base64",
        "input_type": "what a text is for goes into the text, as the model was trained",
        "task": "what a text is for goes into the text, as the model was trained",
        "instruction": "it goes into the texts, as the model was trained",
    },
)
"""Around the fields of these bodies."""


class PoolingFields(ModelFields):
    """What they share."""

    passing: ClassVar[Passing] = POOLING

    model: str = Field(min_length=1, description="The base, an adapter or a mixture, as for completions.")
    pooling: Literal["last", "mean"] | None = Field(
        None, description="Of a text's states: the last token's or the mean; none: as the server is set."
    )
    add_special_tokens: bool = True


class EmbeddingRequest(PoolingFields):
    """POST /v1/embeddings."""

    input: str | Texts | TokenIds | TokenIdLists
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1, description="Numbers of a vector; none: all.")
    normalize: bool = Field(True, description="Vectors have length 1.")

    @field_validator("input", mode="before")
    @classmethod
    def _some_inputs(cls, value: Any) -> Any:
        if isinstance(value, list) and not (value and isinstance(value[0], int)):
            _check_count(len(value), "inputs")
        return value

    @property
    def inputs(self) -> Sequence[Input]:
        """The texts and lists of ids, one by one."""
        given = self.input
        if isinstance(given, str):
            return [given]
        if given and isinstance(given[0], int):
            return [[token for token in given if isinstance(token, int)]]
        return [item for item in given if not isinstance(item, int)]


class ScoreRequest(PoolingFields):
    """POST /score: pairs of texts. One of the first list goes with each of the second, or each with its own."""

    text_1: str | Texts | None = None
    text_2: str | Texts | None = None
    queries: str | Texts | None = Field(None, description="text_1 by vLLM's newer name.")
    documents: str | Texts | None = Field(None, description="text_2 by vLLM's newer name.")

    @model_validator(mode="after")
    def _pairs(self) -> "ScoreRequest":
        for old, new in (("text_1", "queries"), ("text_2", "documents")):
            given = [getattr(self, old), getattr(self, new)]
            if all(each is None for each in given):
                raise refused(old, f"is required; it may be called {new} too")
            if not any(each is None for each in given):
                raise refused(new, f"is another name of {old}: give one of them")
        left, right = self.sides
        _check_count(len(left) + len(right), "texts")
        if not left or not right or (len(left) != 1 and len(left) != len(right)):
            raise refused(
                "text_1",
                f"has {len(left)} texts for {len(right)}: give one, or one for each, and at least one",
            )
        return self

    @property
    def sides(self) -> tuple[list[str], list[str]]:
        """The texts that are compared: one on the left, or as many as on the right."""
        left = self.text_1 if self.text_1 is not None else self.queries
        right = self.text_2 if self.text_2 is not None else self.documents
        return _listed(left), _listed(right)


class DocumentObject(Strict):
    """A document as Cohere and Jina let it be given too."""

    text: str


class RerankRequest(PoolingFields):
    """POST /rerank: documents by how near they are to a query."""

    query: str
    documents: Annotated[list[str | DocumentObject], Field(min_length=1, fail_fast=True)]
    top_n: int | None = Field(None, ge=0, description="Of the nearest, so many; none and 0: all.")
    return_documents: bool = True

    @field_validator("documents", mode="before")
    @classmethod
    def _some_documents(cls, value: Any) -> Any:
        if isinstance(value, list):
            _check_count(len(value) + 1, "texts")
        return value

    @property
    def texts(self) -> list[str]:
        """The documents."""
        return [each if isinstance(each, str) else each.text for each in self.documents]


def _listed(texts: str | list[str] | None) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts or ())


def _check_count(count: int, what: str) -> None:
    if not 1 <= count <= MAX_INPUTS:
        raise ValueError(f"it holds {count} {what}; 1 to {MAX_INPUTS} are taken")
