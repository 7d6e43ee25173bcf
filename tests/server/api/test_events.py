"""What a step's outputs become on the wire: the texts that are written beforehand are the ones that JSON has."""

import json
from collections.abc import Sequence
from typing import Any, cast

import pytest

from manylora.server.api.asks import Ask, chat_ask, completion_ask
from manylora.server.api.chat import ChatForm
from manylora.server.api.completions import CompletionForm
from manylora.server.api.generation import Generation
from manylora.server.api.schemas import ChatRequest, CompletionRequest
from manylora.server.api.writer import DONE, Writer
from manylora.server.catalog import ResolvedModel
from manylora.server.engine.request import FinishReason, SequenceOutput
from manylora.server.tokenizer import ModelText

ODD = ['"', "\\", "\n\r\t", "\x00\x1f\x7f", "\u2028\u2029", "é 😀", "</script>", "%s {} {0}", "data: x\n\n"]
FIELDS = {"model": 'm"{}', "stream": True, "n": 2}
USAGE = {"stream_options": {"include_usage": True}}


def generation(ask: Ask) -> Generation:
    text = ModelText(cast("Any", None), cast("Any", None), cast("Any", None), frozenset())
    return Generation(cast("Any", None), ask, ResolvedModel((), "m", "m"), text, ((1, 2),))


def events_of(kind: str, **fields: object) -> Writer:
    if kind == "chat":
        body = ChatRequest.model_validate(
            {**FIELDS, "messages": [{"role": "user", "content": "x"}], **fields}
        )
        made = generation(chat_ask(body))
        return Writer(made, ChatForm(made, "chatcmpl-1", 5))
    asked = CompletionRequest.model_validate({**FIELDS, "prompt": "x", **fields})
    made = generation(completion_ask(asked))
    return Writer(made, CompletionForm(made, "cmpl-1", 5))


def output(index: int, text: str, finish: FinishReason | None = None) -> SequenceOutput:
    return SequenceOutput("r", index, text, (1,), finish_reason=finish, prompt_tokens=2, completion_tokens=3)


async def chunks_of(events: Writer, outputs: Sequence[tuple[int, SequenceOutput]]) -> list[dict[str, Any]]:
    sent = (await events.of(outputs)).decode()
    *blocks, rest = sent.split("\n\n")
    assert not rest
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


def text_of(chunk: dict[str, Any]) -> str:
    [choice] = chunk["choices"]
    found: str = choice["text"] if "text" in choice else choice["delta"].get("content", "")
    return found


@pytest.mark.parametrize("usage", [{}, USAGE], ids=["", "usage"])
@pytest.mark.parametrize("kind", ["chat", "completion"])
async def test_a_chunk_in_the_middle_is_the_last_one_with_another_text(
    kind: str, usage: dict[str, Any]
) -> None:
    """The last one is written as JSON whole, those in the middle around their text."""
    events = events_of(kind, **usage)
    await events.of([(0, output(0, "a")), (1, output(1, "b"))])
    for text in ODD:
        [middle] = await chunks_of(events, [(1, output(1, text))])
        [last] = await chunks_of(events, [(1, output(1, text, FinishReason.STOP))])
        assert text_of(middle) == text_of(last) == text
        assert middle["choices"][0].pop("finish_reason") is None
        assert last["choices"][0].pop("finish_reason") == "stop"
        assert middle == last
        assert list(middle) == list(last)
        assert middle["model"] == 'm"{}'
        assert ("usage" in middle) == bool(usage)


@pytest.mark.parametrize("kind", ["chat", "completion"])
async def test_all_choices_of_a_step_are_one_piece_and_what_says_nothing_is_left_out(kind: str) -> None:
    events = events_of(kind)
    await events.of([(0, output(0, "a")), (1, output(1, "b"))])
    chunks = await chunks_of(events, [(0, output(0, "c")), (1, output(1, "")), (1, output(1, "d"))])
    assert [(chunk["choices"][0]["index"], text_of(chunk)) for chunk in chunks] == [(0, "c"), (1, "d")]
    assert await events.of([(0, output(0, ""))]) == b""
    assert events.last().decode() == DONE
