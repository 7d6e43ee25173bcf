"""Example prompts through the engine: each as a chat and as it is, as the base reads it, behind everybody else."""

from collections.abc import Sequence
from dataclasses import replace
from uuid import uuid4

import numpy as np

from manylora.server.api.asks import ChatPrompt
from manylora.server.api.base_reading import FORMS, PLAIN, BaseReading, read_chat, read_plain
from manylora.server.api.dependencies import ApiDependencies
from manylora.server.catalog.example_vectors import Vectors
from manylora.server.catalog.types import AUTO_LABEL
from manylora.server.engine.request import (
    FinishReason,
    GenerationRequest,
    Pooling,
    SamplingParams,
    SequenceOutput,
    Vector,
)
from manylora.server.errors import ContextLengthExceeded, ShuttingDown, StepFailed

MOST_TOKENS = 512
"""Tokens of an example that are read: its first ones."""
LAST = 1 << 33
"""Their priority: behind batches, which are behind everybody who waits for an answer."""


async def vectors_of(deps: ApiDependencies, examples: Sequence[str]) -> Vectors:
    """Return the examples' vectors in each form. Raises ServerError."""
    readings = [_cut(await _read(deps, example, form)) for form in FORMS for example in examples]
    pooled = await pool(deps, readings, priority=LAST, scope=AUTO_LABEL)
    rows = [each.vector(states) for each, states in zip(readings, pooled, strict=True)]
    found = np.stack(rows).astype(np.float16)
    return {
        form: found[place * len(examples) : (place + 1) * len(examples)] for place, form in enumerate(FORMS)
    }


async def pool(
    deps: ApiDependencies,
    readings: Sequence[BaseReading],
    *,
    priority: int,
    scope: str,
    tenant: str = "",
    weight: float = 1.0,
) -> list[Vector]:
    """Return what the base makes of prompts: the mean of the states of the tokens that count, float32 [hidden] each.

    Who is cancelled ends the work. Raises what the engine refuses or fails them for.
    """
    own = f"{AUTO_LABEL}-{uuid4().hex[:12]}"
    requests = [
        GenerationRequest(
            request_id=f"{own}-{index}",
            prompt_token_ids=reading.ids,
            sampling=SamplingParams(),
            adapter_label=AUTO_LABEL,
            origin=own,
            pooling=Pooling.MEAN,
            pooled_from=reading.counted_from,
            priority=priority,
            cache_scope=scope,
            tenant=tenant,
            weight=weight,
        )
        for index, reading in enumerate(readings)
    ]
    stream = deps.engine.submit_together(requests)
    found: dict[int, Vector] = {}
    try:
        while (outputs := await stream.take()) is None or outputs:
            for index, output in outputs or ():
                found[index] = _vector_of(output)
    finally:
        stream.abort()
    return [found[index] for index in range(len(requests))]


async def _read(deps: ApiDependencies, example: str, form: str) -> BaseReading:
    """Return an example as the base reads it; of one that is longer than the context as much as fits."""
    while True:
        try:
            if form == PLAIN:
                return await read_plain(deps, example, "examples")
            chat = ChatPrompt(messages=[{"role": "user", "content": example}], param="examples")
            return await read_chat(deps, chat)
        except ContextLengthExceeded:
            if len(example) == 1:
                raise
            example = example[: len(example) // 2]


def _cut(reading: BaseReading) -> BaseReading:
    most = reading.turn_from + MOST_TOKENS
    return replace(reading, ids=reading.ids[:most])


def _vector_of(output: SequenceOutput) -> Vector:
    if output.pooled is not None:
        return output.pooled
    if output.error is not None:
        raise output.error
    if output.finish_reason is FinishReason.ABORTED:
        raise ShuttingDown("the request was ended by the server")
    raise StepFailed("the request failed in the engine")
