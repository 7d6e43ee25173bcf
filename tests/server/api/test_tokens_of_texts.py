"""Which tokens of an answer are whose: of its texts, and not of the thoughts and calls beside them."""

import random
from collections.abc import Sequence

import pytest

from manylora.server.api.blocks import Parts
from manylora.server.api.choices import Choice
from manylora.server.chat.formats.hermes import FORMAT
from manylora.server.chat.reading import Reading
from manylora.server.chat.tools import Tool, ToolUse
from manylora.server.engine.output_stream import UNREAD, OutputStream
from manylora.server.engine.request import (
    FinishReason,
    GenerationRequest,
    SamplingParams,
    SequenceOutput,
    TokenLogprobs,
)

THOUGHT = ["<think>", "\n", "so", "</think>"]
SAID = ["\n\n", "I ", "<", "3 ", "", "O", "slo", ": "]
CALL = ["\n<tool", "_call>\n", '{"name": "w", ', '"arguments": {"a"', ": 1}}", "\n</tool_call>"]
LAST = ["\n", "so", ""]
ANSWER = [*THOUGHT, *SAID, *CALL, *LAST]
SPOKEN = [[*range(4, 12)], [*range(19, 21)]]
"""The tokens of each text, by number: what closes a call is of no text."""


def outputs(tokens: Sequence[str]) -> list[SequenceOutput]:
    ends = len(tokens) - 1
    return [
        SequenceOutput(
            "r",
            0,
            text,
            (number,),
            (TokenLogprobs(number, -1.0),),
            finish_reason=FinishReason.STOP if number == ends else None,
        )
        for number, text in enumerate(tokens)
    ]


def choice() -> Choice:
    use = ToolUse((Tool("w", None, None),))
    return Choice(Reading(FORMAT, use, thinks=True).parser(), by_token=True)


async def joined(each: Sequence[SequenceOutput]) -> list[SequenceOutput]:
    """Return outputs as who hasn't read for long finds them: as one."""
    request = GenerationRequest("r", (1,), SamplingParams())
    stream = OutputStream([request], lambda _: None)
    filler = [SequenceOutput("r", 0, "", ())] * (UNREAD + 3 - len(each) // 2)
    for output in (*filler, *each):
        stream.feed(output)
    return [output for _, output in await stream.take() or ()]


def texts_of(parts: Parts) -> list[list[int]]:
    return [[token.token_id for token in part.tokens] for part in parts.done if part.kind == "text"]


def told(steps: Sequence[SequenceOutput]) -> tuple[list[list[int]], list[tuple[str, str]]]:
    whole, streamed = Parts(thoughts=True), Parts(thoughts=True)
    kept, read = choice(), choice()
    come: list[tuple[int, int]] = []
    for output in steps:
        kept.add(output)
        for each in read.read(0, output).brought:
            come += [
                (happened.part.index, token.token_id)
                for happened in streamed.push(each.deltas, each.token, thought=each.thought)
                for token in happened.tokens
                if happened.part.kind == "text"
            ]
    come += [(h.part.index, t.token_id) for h in streamed.end() for t in h.tokens if h.part.kind == "text"]
    for each in kept.brought:
        list(whole.push(each.deltas, each.token, thought=each.thought))
    list(whole.end())
    assert texts_of(whole) == texts_of(streamed)
    assert sorted(come) == [
        (part.index, token.token_id) for part in whole.done if part.kind == "text" for token in part.tokens
    ]
    return texts_of(whole), [(part.kind, part.text) for part in whole.done]


def test_a_texts_tokens_are_those_that_spell_it() -> None:
    tokens, parts = told(outputs(ANSWER))
    assert [kind for kind, _ in parts] == ["thought", "text", "call", "text"]
    assert tokens == SPOKEN


@pytest.mark.parametrize("seed", range(20))
async def test_who_reads_late_is_told_the_same(seed: int) -> None:
    pick = random.Random(seed)
    text = "".join(ANSWER)
    places = sorted(pick.sample(range(1, len(text)), pick.randrange(3, 30)))
    cut = [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]
    late = await joined(outputs(cut))
    assert len(late) < len(cut)
    assert told(late) == told(outputs(cut))
