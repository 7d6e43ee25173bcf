"""Writes conversations out by the chat template, and finds in the text what the assistant wrote.

No template says which part is the assistant's. So every turn's prompt is rendered as the server renders it and
compared with the whole: what follows the prompt is the answer. Some templates write earlier turns otherwise once
others follow (they drop old reasoning, or move the system text); there a turn is found by rendering the whole again
with other words in its place.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

from jinja2.exceptions import TemplateError

from manylora.training.data.example import Example, Message, Tool
from manylora.training.errors import InvalidData

_TEMPLATE_FAULTS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What a template, which is a program over the messages, raises when they don't suit it."""

_WORDS_KNOWN_BY = 16
"""Characters of a message by which a prompt's end is known again where what is before it differs."""
_LONGEST_LEAD = 64
"""Characters that a template may put between the prompt and the answer's own words: a space, an empty thought."""


class ChatTokenizer(Protocol):
    """The part of a transformers tokenizer that writes conversations out."""

    chat_template: Any

    def apply_chat_template(self, conversation: Sequence[Message], **kwargs: Any) -> Any:
        """Write a conversation out; with ``tokenize=False`` as a string."""
        ...


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a text that one turn of the assistant takes up, in characters."""

    start: int
    """Where the server's prompt ends and the model begins to write."""
    end: int
    """Behind all that belongs to the turn, the template's end-of-turn text included."""


@dataclass(frozen=True, slots=True)
class Written:
    """A conversation as text."""

    text: str
    spans: tuple[Span, ...]
    """The trained turns, in order."""
    as_served: bool
    """Whether every trained turn stands behind exactly the text that the server would prompt it with."""


class Template:
    """A tokenizer's chat template.

    ``system`` is put before conversations that have no system turn of their own; without it, that is the template's
    business.
    """

    def __init__(self, tokenizer: ChatTokenizer, *, system: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._system = system
        self._ending = ""  # what this template was last seen to put behind a turn that others follow
        self.takes_system = self._probe_system()

    def write(self, example: Example) -> Written:
        """Render a conversation. Raises InvalidData where the template refuses it or hides what the assistant said."""
        if not self._tokenizer.chat_template:
            raise InvalidData(
                f"{example.source}: the tokenizer has no chat template, which conversations need; "
                "train on plain text, or give the tokenizer a template"
            )
        example = self._with_system(example)
        if not any(example.trained):
            raise InvalidData(f"{example.source}: there is no message of the assistant to train on")
        try:
            return self._write(example)
        except _TEMPLATE_FAULTS as error:
            if not any("tool_calls" in message for message in example.messages):
                raise _refused(example, error) from error
        # Most templates write calls' arguments as JSON themselves; some expect them written already.
        try:
            return self._write(replace(example, messages=tuple(map(_with_json_arguments, example.messages))))
        except _TEMPLATE_FAULTS as error:
            raise _refused(example, error) from error

    def _write(self, example: Example) -> Written:
        messages, tools = example.messages, example.tools
        text = self._render(messages, tools)
        spans = []
        as_served = True
        for index, trained in enumerate(example.trained):
            if trained:
                span, same = self._find_turn(text, example, index)
                spans.append(span)
                as_served = as_served and same
        if any(next_.start < span.end for span, next_ in pairwise(spans)):
            raise InvalidData(f"{example.source}: the chat template doesn't keep the assistant's turns apart")
        return Written(text, tuple(spans), as_served)

    def _find_turn(self, text: str, example: Example, index: int) -> tuple[Span, bool]:
        """Find a turn in the whole; also whether it, and what is before it, reads there as it would alone."""
        messages, tools = example.messages, example.tools
        prompt = self._try_render(messages[:index], tools, prompting=True)
        behind_prompt = prompt is not None and text.startswith(prompt)
        if prompt is not None and behind_prompt and index == len(messages) - 1:
            return Span(len(prompt), len(text)), True
        alone = self._try_render(messages[: index + 1], tools)
        if prompt is not None and behind_prompt and alone is not None:
            if len(alone) > len(prompt) and text.startswith(alone):
                return Span(len(prompt), len(alone)), True
            turn = f"{prompt}{messages[index]['content']}{self._ending}"
            nothing_else = messages[index].keys() <= {"role", "content"}
            if self._ending and nothing_else and text.startswith(turn):
                return Span(len(prompt), len(turn)), alone.startswith(turn)
        return self._find_by_substitution(text, example, index, prompt, alone)

    def _find_by_substitution(
        self, text: str, example: Example, index: int, prompt: str | None, alone: str | None
    ) -> tuple[Span, bool]:
        """Find a turn in the whole by putting other words in its place."""
        messages, tools = example.messages, example.tools
        words = self._words_of(text, messages, index, tools)
        if words is None:
            raise InvalidData(
                f"{example.source}: can't tell where message {index + 1}, the assistant's, stands in what the chat "
                "template makes of this conversation; end the conversation with it, or give it weight 0"
            )
        until_here = messages[: index + 1]
        words_alone = None if alone is None else self._words_of(alone, until_here, index, tools)
        if alone is None or words_alone is None:
            return words, False
        end = words.end + _common_prefix(text[words.end :], alone[words_alone.end :])
        if prompt is None:  # the assistant speaks first: the server never prompts that
            same = text[words.start : words.end] == alone[words_alone.start : words_alone.end]
            return Span(words.start, end), same
        if not text.startswith(prompt):
            ending = _ending(prompt, str(messages[index - 1]["content"]))
            return Span(words.start - _written_before_answer(text[: words.start], ending), end), False
        self._ending = text[words.end : end]
        same = text[len(prompt) : words.end] == alone[len(prompt) : words_alone.end]
        return Span(len(prompt), end), same

    def _words_of(
        self, text: str, messages: Sequence[Message], index: int, tools: Sequence[Tool]
    ) -> Span | None:
        """Return where ``text`` changes when a turn says something else, or None if that can't be told."""
        other = next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)
        changed = [*messages[:index], {"role": "assistant", "content": other}, *messages[index + 1 :]]
        rendered = self._try_render(changed, tools)
        if rendered is None or rendered.count(other) != 1:
            return None
        start = _common_prefix(text, rendered)
        behind = _common_prefix(text[start:][::-1], rendered[start:][::-1])
        return Span(start, len(text) - behind)

    def _render(self, messages: Sequence[Message], tools: Sequence[Tool], *, prompting: bool = False) -> str:
        text = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            add_generation_prompt=prompting,
            tokenize=False,
        )
        return str(text)

    def _try_render(
        self, messages: Sequence[Message], tools: Sequence[Tool], *, prompting: bool = False
    ) -> str | None:
        """Render a part of a conversation, which a template may refuse although it takes the whole."""
        if not messages:
            return None
        try:
            return self._render(messages, tools, prompting=prompting)
        except _TEMPLATE_FAULTS:
            return None

    def _probe_system(self) -> bool:
        if not self._tokenizer.chat_template:
            return True
        system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "u"}
        with_it, without = (self._try_render(turns, (), prompting=True) for turns in ([system, user], [user]))
        return with_it is not None or without is None

    def _with_system(self, example: Example) -> Example:
        """Add the system text that was asked for; where the template takes none, put it before the user's first."""
        messages, trained = example.messages, example.trained
        if self._system and messages and messages[0]["role"] != "system":
            messages = ({"role": "system", "content": self._system}, *messages)
            trained = (False, *trained)
        roles = [message["role"] for message in messages[:2]]
        if not self.takes_system and roles == ["system", "user"]:
            system, user, *rest = messages
            both = {**user, "content": f"{system['content']}\n\n{user['content']}"}
            messages, trained = (both, *rest), trained[1:]
        return replace(example, messages=messages, trained=trained)


def _refused(example: Example, error: Exception) -> InvalidData:
    roles = ", ".join(str(message["role"]) for message in example.messages[:8])
    return InvalidData(
        f"{example.source}: the chat template refuses this conversation ({roles}): {' '.join(str(error).split())}"
    )


def _with_json_arguments(message: Message) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    functions = [
        {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}
        for call in calls
    ]
    written = [{**call, "function": function} for call, function in zip(calls, functions, strict=True)]
    return {**message, "tool_calls": written}


def _ending(prompt: str, content: str) -> str:
    """Return a prompt from the last words of its last message on."""
    words = content.strip()[-_WORDS_KNOWN_BY:]
    return prompt[prompt.rfind(words) :] if words and words in prompt else prompt


def _written_before_answer(text: str, ending: str) -> int:
    """Return how many characters the template puts between a prompt, which ends so, and the answer's own words."""
    for length in range(min(_LONGEST_LEAD, len(text)) + 1):
        if text.endswith(ending, 0, len(text) - length):
            return length
    return 0


def _common_prefix(one: str, other: str) -> int:
    """Return how many characters two texts begin with in common, by halving."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
