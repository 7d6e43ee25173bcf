"""Which part of an answer its tokens are told with."""

from typing import Any

from manylora.server.api.blocks import Parts
from manylora.server.api.choices import Choice
from manylora.server.chat.deltas import Arguments, CallBegins, Content
from manylora.server.engine.request import FinishReason, SequenceOutput, TokenLogprobs


def token(number: int) -> TokenLogprobs:
    return TokenLogprobs(number, -1.0, ())


def test_what_closed_a_call_is_not_told_as_the_next_text_s() -> None:
    parts = Parts(thoughts=True)
    said: list[tuple[int, tuple[Any, ...]]] = [
        (0, (Content("a"),)),
        (1, ()),
        (2, (CallBegins(0, "c", "f"), Arguments(0, "{"))),
        (3, (Arguments(0, "}"),)),
        (4, ()),
        (5, ()),
        (6, (Content("b"),)),
        (7, ()),
        (8, (Content("c"),)),
    ]
    for number, deltas in said:
        list(parts.push(deltas, token(number)))
    list(parts.end())
    assert [(part.kind, part.text) for part in parts.done] == [("text", "a"), ("call", "{}"), ("text", "bc")]
    told = [[each.token_id for each in part.tokens] for part in parts.done if part.kind == "text"]
    assert told == [[0], [6, 7, 8]]


def test_the_token_that_ended_an_answer_brings_nothing() -> None:
    choice, parts = Choice(by_token=True), Parts(thoughts=True)
    outputs = (
        SequenceOutput("r", 0, "a", (1,), (token(1),)),
        SequenceOutput("r", 0, "", (2,), (token(2),), finish_reason=FinishReason.STOP, silent_end=True),
    )
    brought = [each for output in outputs for each in choice.read(0, output).brought]
    happened = [what for each in brought for what in parts.push(each.deltas, each.token)] + list(parts.end())
    assert [each.text for each in happened if each.what == "goes on"] == ["a"], "and nothing empty after it"
    assert parts.done[0].tokens == [token(1)]
