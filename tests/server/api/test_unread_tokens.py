"""Tokens that are made and never read are their key's all the same."""

import asyncio
from dataclasses import replace
from typing import cast

import pytest

from manylora.adapters.keys import KeyTerms
from manylora.server.api.asks import Ask, PlainPrompts
from manylora.server.api.generation import Generation
from manylora.server.api.mixture_fields import ModelFields
from manylora.server.catalog import ResolvedModel
from manylora.server.engine.output_stream import OutputStream
from manylora.server.engine.request import FinishReason, GenerationRequest, SamplingParams, SequenceOutput
from manylora.server.errors import StepFailed
from manylora.server.tenants.account import Account
from manylora.server.tokenizer import ModelText

PROMPT = (1, 2, 3)


def made(count: int) -> SequenceOutput:
    return SequenceOutput("r", 0, "x", (count,), completion_tokens=count)


def under_way(account: Account) -> tuple[OutputStream, Generation]:
    stream = OutputStream([GenerationRequest("r", PROMPT, SamplingParams())], lambda request_id: None)
    ask = Ask(
        model="a",
        beside=ModelFields(),
        prompt=PlainPrompts(prompts=[PROMPT]),
        sampling=SamplingParams(),
    )
    reservation = account.enter(0.0).reserve(100, 0.0)
    model, text = ResolvedModel((), "a", "a"), cast(ModelText, None)  # which says nothing of tokens
    return stream, Generation(stream, ask, model, text, (PROMPT,), reservation=reservation)


async def test_a_client_that_leaves_is_charged_what_nobody_read() -> None:
    account = Account(KeyTerms("acme", budget=1000), 0)
    stream, generation = under_way(account)
    collecting = asyncio.ensure_future(generation.collect())
    await asyncio.sleep(0)
    for count in (1, 2, 3):
        stream.feed(made(count))
    collecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await collecting
    assert (account.used, account.reserved) == (len(PROMPT) + 3, 0)


async def test_what_was_made_before_it_failed_is_charged() -> None:
    account = Account(KeyTerms("acme", budget=1000), 0)
    stream, generation = under_way(account)
    failed = replace(made(4), finish_reason=FinishReason.FAILED, error=StepFailed("x"))
    for output in (made(1), made(2), failed):
        stream.feed(output)
    with pytest.raises(StepFailed):
        await generation.collect()
    assert (account.used, account.reserved) == (len(PROMPT) + 4, 0)
