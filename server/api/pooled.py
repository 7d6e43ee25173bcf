"""Texts to vectors: the inputs of a request are queued as one, pooled by the engine, cut and normalised here."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from fastapi import Request

from manylora.server.api.asks import Ask, PlainPrompts
from manylora.server.api.dependencies import ApiDependencies
from manylora.server.api.disconnect import done_within, unless_gone
from manylora.server.api.embedding_schemas import Input, PoolingFields
from manylora.server.api.generation import Generation, begin
from manylora.server.catalog import ResolvedModel
from manylora.server.engine.request import Pooling, SamplingParams, Vector
from manylora.server.errors import ContextLengthExceeded, InvalidRequest


@dataclass(frozen=True, slots=True)
class Pooled:
    """The vectors of a request's inputs, in order, and what they were made of."""

    vectors: list[Vector]
    model: ResolvedModel
    tokens: int

    @property
    def usage(self) -> dict[str, int]:
        """The usage object."""
        return {"prompt_tokens": self.tokens, "total_tokens": self.tokens}


async def pooled(
    request: Request, deps: ApiDependencies, body: PoolingFields, inputs: Sequence[Input], param: str
) -> Pooled:
    """Return the inputs' vectors, as long as the model's states; who hangs up ends the work.

    Raises ContextLengthExceeded, InvalidRequest, QueueFull, and what else a prompt is refused for.
    """
    generation = await unless_gone(request, _begin(deps, body, inputs, param))
    choices = asyncio.ensure_future(generation.collect())
    await done_within(request, choices)
    vectors = []
    for choice in choices.result():
        assert choice.last is not None
        assert choice.last.pooled is not None
        vectors.append(choice.last.pooled)
    return Pooled(vectors, generation.model, sum(map(len, generation.prompts)))


def normalised(vector: Vector, dimensions: int | None = None) -> Vector:
    """Return the vector, or its first ``dimensions`` numbers, with length 1; one of zeros stays."""
    cut = vector[:dimensions].astype(np.float64)
    # Squares of large states would leave float32's range.
    length = float(np.linalg.norm(cut))
    return (cut / length if length else cut).astype(np.float32)


async def _begin(
    deps: ApiDependencies, body: PoolingFields, inputs: Sequence[Input], param: str
) -> Generation:
    prompt = PlainPrompts(prompts=inputs, add_special_tokens=body.add_special_tokens, param=param)

    def pooling(model: ResolvedModel) -> Pooling:
        return _pooling(body, model, deps.settings.pooling)

    ask = Ask(model=body.model, beside=body, prompt=prompt, sampling=SamplingParams(), pooling=pooling)
    try:
        return await begin(deps, ask)
    except ContextLengthExceeded as error:
        message = f"{param}: {error}: send it in parts"
        raise ContextLengthExceeded(message, error.overrun, param=param) from None


def _pooling(body: PoolingFields, model: ResolvedModel, usual: Pooling) -> Pooling:
    """Return how texts are pooled: as asked, else as its adapters say, else as is usual. Raises InvalidRequest."""
    if body.pooling is not None:
        return Pooling(body.pooling)
    if len(model.poolings) > 1:
        raise InvalidRequest(
            "pooling: the mixture's adapters were made for different ones, last and mean: say which",
            param="pooling",
        )
    return next((Pooling(way) for way in model.poolings), usual)
