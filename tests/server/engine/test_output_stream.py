"""What a client's reader finds: all of its prompts' outputs in one queue, whether it reads or not."""

import asyncio
from dataclasses import replace

import pytest

from manylora.server.engine.output_stream import UNREAD, OutputStream
from manylora.server.engine.request import FinishReason, GenerationRequest, SamplingParams, SequenceOutput
from manylora.server.errors import StepFailed


def stream_of(prompts: int, n: int = 1, aborted: list[str] | None = None) -> OutputStream:
    requests = [GenerationRequest(f"r{i}", (1,), SamplingParams(), n=n) for i in range(prompts)]
    return OutputStream(requests, (aborted if aborted is not None else []).append)


def said(request: int, index: int, count: int, finish: FinishReason | None = None) -> SequenceOutput:
    return SequenceOutput(
        f"r{request}", index, f"{count} ", (count,), finish_reason=finish, completion_tokens=count
    )


async def test_choices_of_all_prompts_are_numbered_through() -> None:
    stream = stream_of(2, n=3)
    for request in (0, 1):
        for index in range(3):
            over = stream.feed(said(request, index, 1, FinishReason.STOP))
            assert over == (index == 2)
    assert [number for number, _ in await stream.take() or ()] == [0, 1, 2, 3, 4, 5]
    assert stream.ended
    assert await stream.take() == []


async def test_a_reader_waits_until_there_is_something_or_somebody_nudges() -> None:
    stream = stream_of(1)
    reading = asyncio.ensure_future(stream.take())
    await asyncio.sleep(0)
    assert not reading.done()
    stream.nudge()
    assert await reading is None
    reading = asyncio.ensure_future(stream.take())
    await asyncio.sleep(0)
    stream.feed(said(0, 0, 1))
    assert [output.text for _, output in await reading or ()] == ["1 "]


async def test_who_does_not_read_takes_the_memory_of_its_text_and_no_more() -> None:
    stream = stream_of(2)
    count = 20 * UNREAD
    for number in range(1, count + 1):
        for request in (0, 1):
            stream.feed(said(request, 0, number))
        assert len(stream._ready) <= UNREAD + 5  # what it holds is seen nowhere else
    stream.feed(said(1, 0, count + 1, FinishReason.LENGTH))
    outputs = await stream.take() or []
    for request, last in ((0, count), (1, count + 1)):
        mine = [output for number, output in outputs if number == request]
        assert "".join(output.text for output in mine) == "".join(f"{i} " for i in range(1, last + 1))
        assert [token for output in mine for token in output.token_ids] == list(range(1, last + 1))
        assert mine[-1].completion_tokens == last
    assert outputs[-1][1].finish_reason is FinishReason.LENGTH


async def test_what_ends_a_request_keeps_the_counts_of_what_was_made_before() -> None:
    stream = stream_of(1)
    for number in range(1, UNREAD + 10):
        stream.feed(said(0, 0, number))
    ended = replace(said(0, 0, 0, FinishReason.FAILED), text="", token_ids=(), error=StepFailed("x"))
    stream.feed(ended)
    outputs = await stream.take() or []
    assert max(output.completion_tokens for _, output in outputs) == UNREAD + 9
    assert isinstance(outputs[-1][1].error, StepFailed)


@pytest.mark.parametrize("n", [1, 3])
async def test_failing_ends_what_has_not_ended_and_aborting_names_it(n: int) -> None:
    aborted: list[str] = []
    stream = stream_of(2, n, aborted)
    for index in range(n):
        stream.feed(said(0, index, 1, FinishReason.STOP))
    stream.abort()
    assert aborted == ["r1"]
    stream.fail(StepFailed("x"))
    outputs = await stream.take() or []
    assert [number for number, output in outputs if output.error] == list(range(n, 2 * n))
    assert stream.ended


async def test_what_was_made_counts_whether_it_is_read_or_not() -> None:
    stream = stream_of(1, n=2)
    stream.feed(said(0, 0, 1))
    await stream.take()
    stream.feed(said(0, 0, 2))
    stream.feed(said(0, 1, 5))
    assert stream.made == 7
    stream.fail(StepFailed("x"))
    assert stream.made == 7, "what ended them made nothing, and took nothing back"
