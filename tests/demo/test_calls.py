"""Conversations that call functions: what is held out stays out, calls are right, and the template tells all of it."""

import json
import random
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from manylora.demo.calls import Conversation, draw_errand, draw_functions, function_for, wants_of
from manylora.demo.conversations import draw_conversation
from manylora.demo.heldout_calls import Asked, held_out_questions
from manylora.demo.tokenizer import CHAT_TEMPLATE, CONTEXT
from manylora.demo.tool_data import write_conversations
from manylora.demo.words import SCHEMAS

BASE = Path(__file__).resolve().parents[2] / "demo" / "base"
DRAWS = 200


@pytest.fixture(scope="module")
def conversations() -> list[Conversation]:
    rng = random.Random(7)
    return [draw_conversation(rng) for _ in range(DRAWS)]


@pytest.fixture(scope="module")
def asked() -> tuple[Asked, ...]:
    return held_out_questions(count=60)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(BASE)


def test_questions_are_either_trained_or_held_out() -> None:
    rng = random.Random(11)
    trained, held = ([draw_errand(rng, held_out=out) for _ in range(DRAWS)] for out in (False, True))

    def keys(errands: list[object]) -> set[object]:
        return {(each.want.given, each.want.asked, each.values[0]) for each in errands}  # type: ignore[attr-defined]

    assert not keys([*trained]) & keys([*held])


def test_every_call_is_of_a_function_that_is_offered(conversations: list[Conversation]) -> None:
    for drawn in conversations:
        offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in drawn.tools}
        assert len(offered) == len(drawn.tools)
        for message in drawn.messages:
            for call in message.get("tool_calls", ()):
                arguments = json.loads(call["function"]["arguments"])
                assert list(arguments) == offered[call["function"]["name"]]["required"]


def test_a_question_has_one_function_at_most_that_answers_it() -> None:
    rng = random.Random(3)
    for _ in range(DRAWS):
        want = rng.choice(wants_of(rng.choice(SCHEMAS)))
        functions = draw_functions(rng, (want,))
        assert functions[want].want == want
        assert len({function.name for function in functions.values()}) == len(functions)
        assert want.gives not in {each.gives for each in draw_functions(rng, (), (want,))}


def test_the_name_of_a_function_says_what_it_does() -> None:
    wants = [want for schema in SCHEMAS for want in wants_of(schema)]
    functions = [function_for(want) for want in wants]
    assert len({function.name for function in functions}) == len(functions)
    for want, function in zip(wants, functions, strict=True):
        assert want.asked in function.name
        assert want.given in function.parameters


def test_held_out_questions_are_of_every_kind(asked: tuple[Asked, ...]) -> None:
    assert {len(one.called) for one in asked} == {0, 1, 2}
    assert any(len(arguments) == 2 for one in asked for _, arguments in one.called)
    assert all(errand.held_out for one in asked for errand in one.exchange.errands)


def test_the_template_is_the_one_that_ships() -> None:
    assert (BASE / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_the_template_tells_tools_calls_and_results(tokenizer: PreTrainedTokenizerFast) -> None:
    def tool(name: str, *parameters: str) -> dict[str, object]:
        properties = {each: {"type": "string"} for each in parameters}
        return {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}

    def call(name: str, **arguments: object) -> dict[str, object]:
        return {"type": "function", "function": {"name": name, "arguments": arguments}}

    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Go."},
        {"role": "assistant", "content": None, "tool_calls": [call("a", x=1, y="ß"), call("b")]},
        {"role": "tool", "content": "one"},
        {"role": "tool", "content": "two"},
        {"role": "assistant", "content": "Done."},
    ]
    told = tokenizer.apply_chat_template(messages, tools=[tool("a", "x", "y"), tool("b")], tokenize=False)
    assert told == (
        "<|im_start|>system\nBe brief.\n\n<tools>\na(x, y)\nb()\n</tools><|im_end|>\n"
        "<|im_start|>user\nGo.<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "a", "arguments": {"x": 1, "y": "ß"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "b", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\none\n</tool_response>\n"
        "<tool_response>\ntwo\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nDone.<|im_end|>\n"
    )


def test_a_conversation_is_far_shorter_than_the_context(
    conversations: list[Conversation], tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = [
        tokenizer.apply_chat_template(list(each.messages), tools=list(each.tools), tokenize=False)
        for each in conversations
    ]
    assert max(len(ids) for ids in tokenizer(texts)["input_ids"]) < CONTEXT * 2 // 3


def test_the_same_seed_writes_the_same_file(tmp_path: Path) -> None:
    def written(name: str, seed: int) -> str:
        write_conversations(tmp_path / name, 20, seed)
        return (tmp_path / name).read_text()

    first = written("first.jsonl", 1)
    assert first == written("again.jsonl", 1) != written("other.jsonl", 2)
    rows = [json.loads(line) for line in first.splitlines()]
    assert all(row["messages"][-1]["role"] == "assistant" for row in rows)
