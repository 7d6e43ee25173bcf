"""Held-out questions to the adapter that calls functions, and the share of turns that a model gets exactly right."""

import json
import random
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from manylora.demo.calls import Message
from manylora.demo.conversations import Exchange, draw_exchanges

QUESTIONS = 200


@dataclass(frozen=True)
class Asked:
    """One held-out question with the functions that are offered."""

    exchange: Exchange
    tools: tuple[dict[str, Any], ...]
    messages: tuple[Message, ...]
    """All of it, as it should go."""

    @property
    def called(self) -> list[tuple[str, dict[str, Any]]]:
        """The calls that are right, in order; none where no function fits."""
        calls = [call["function"] for message in self.messages for call in message.get("tool_calls", ())]
        return [(call["name"], json.loads(call["arguments"])) for call in calls]


def held_out_questions(seed: int = 3, count: int = QUESTIONS) -> tuple[Asked, ...]:
    """Questions about what was never asked in training; two calls are made at once."""
    rng = random.Random(seed)
    found: list[Asked] = []
    while len(found) < count:
        functions, (exchange,) = draw_exchanges(rng, 1, held_out=True)
        if exchange.at_once:
            tools = tuple(each.tool for each in functions.values())
            found.append(Asked(exchange, tools, tuple(exchange.messages(functions, 0))))
    return tuple(found)


@torch.no_grad()
def turns_right(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, asked: tuple[Asked, ...]
) -> dict[str, float]:
    """The shares of calls, of refusals and of answers from results that are right, to the end-of-turn token.

    As `exact_match` does: one pass tells what greedy generation would give.
    """
    right: dict[str, list[bool]] = {}
    for one in asked:
        messages = [_for_template(message) for message in one.messages]
        for place, message in enumerate(messages):
            if message["role"] == "assistant":
                kind = (
                    "refusals" if not one.exchange.fits else "calls" if "tool_calls" in message else "answers"
                )
                right.setdefault(kind, []).append(_greedy(model, tokenizer, one, messages[:place], message))
    return {kind: sum(each) / len(each) for kind, each in right.items()}


def _greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    asked: Asked,
    before: list[Message],
    message: Message,
) -> bool:
    tools = list(asked.tools)
    opening = tokenizer.apply_chat_template(before, tools=tools, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*before, message], tools=tools, tokenize=False)
    texts = [opening, whole.removeprefix(opening).removesuffix("\n")]
    prompt, answer = tokenizer(texts, add_special_tokens=False)["input_ids"]
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
    return bool(logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer)


def _for_template(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}
