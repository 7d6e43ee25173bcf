"""Prompts as the base reads them, to find out whose they are: by its own template and tokens, and which of these count.

Of a chat that is what stands up to its last user's turn, as the base would be asked it: if the base is to answer, its
KV is in the prefix cache then; and what follows a turn, calls and results, doesn't change whose it is. The tokens from
that turn on count, having seen all that stands before them.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from manylora.server.api.asks import ChatPrompt
from manylora.server.api.dependencies import ApiDependencies
from manylora.server.api.talk import Talk
from manylora.server.api.tokenising import check_length, most_characters
from manylora.server.catalog.prompt_vectors import LAST, Floats, prompt_vector
from manylora.server.chat.tools import ToolUse
from manylora.server.engine.door import context_exceeded
from manylora.server.errors import InvalidRequest
from manylora.server.tokenizer import TooManyTokens

CHAT, PLAIN = "chat", "plain"
FORMS = (CHAT, PLAIN)
"""How prompts come: written out by a chat template, or as they are. One isn't compared with the other."""


@dataclass(frozen=True, slots=True)
class BaseReading:
    """A prompt's tokens."""

    form: str
    ids: tuple[int, ...]
    turn_from: int = 0
    """The first token of what was asked last, which is all of a plain prompt."""

    @property
    def counted_from(self) -> int:
        """The first token whose state counts."""
        return max(self.turn_from, len(self.ids) - LAST)

    def vector(self, states: Floats) -> Floats:
        """Return the prompt's vector, given the mean of the states that count."""
        return prompt_vector(states, self.ids[self.turn_from :])


async def read_chat(deps: ApiDependencies, prompt: ChatPrompt) -> BaseReading:
    """Return a chat as the base reads it; one that its template can't write is read by its last user's turn alone.

    Raises ContextLengthExceeded, InvalidRequest for a text that is too long, and QueueFull.
    """
    messages = _up_to_the_last_user(prompt.messages)
    alone = replace(prompt, messages=messages[-1:], tools=ToolUse(), variables={}, reasoning_effort=None)
    for each in (replace(prompt, messages=messages), alone):
        try:
            whole, tail = await _written(deps, each)
        except InvalidRequest:
            continue
        ids, counted = await _encoded(deps, (whole, tail), prompt.param, special=False)
        # A tail of no tokens is a template that writes nothing of a turn and nothing behind it.
        return BaseReading(CHAT, ids, max(0, len(ids) - max(1, len(counted))))
    return await read_plain(deps, str(messages[-1].get("content") or ""), prompt.param)


async def read_plain(
    deps: ApiDependencies, text: str, param: str, *, add_special_tokens: bool = True
) -> BaseReading:
    """Return a text as the base reads it: all of it counts. Raises as ``read_chat`` does."""
    [ids] = await _encoded(deps, (text,), param, special=add_special_tokens)
    if not ids:
        raise InvalidRequest(f"{param} is empty: nothing tells whose prompt it is", param=param)
    return BaseReading(PLAIN, ids)


def _up_to_the_last_user(messages: Sequence[Mapping[str, object]]) -> Sequence[Mapping[str, object]]:
    """Return the messages without what follows the last user's; all of them where no user speaks."""
    users = [place for place, message in enumerate(messages) if message.get("role") == "user"]
    return messages[: users[-1] + 1] if users else messages


async def _written(deps: ApiDependencies, prompt: ChatPrompt) -> tuple[str, str]:
    """Return what the base's template makes of messages, and the part of it that is the last of them and what follows.

    Raises InvalidRequest for what the template doesn't take.
    """
    template = deps.tokenizer.template(tools=bool(prompt.tools.tools))
    told = replace(
        prompt,
        tools=ToolUse(prompt.tools.tools, "none"),  # how calls are written is of no matter here
        effort_if_known=True,
        add_generation_prompt=True,
        continue_final_message=False,
    )
    talk = Talk.of(told, template, deps.texts.base.vocabulary, deps.settings.tool_parser).prompt
    empty = [*talk.messages[:-1], {**talk.messages[-1], "content": ""}]
    seen = {**deps.texts.base.special_tokens, **talk.variables}
    characters = sum(len(str(message.get("content"))) for message in talk.messages)

    def render() -> tuple[str, str]:
        whole = deps.tokenizer.render(talk.messages, seen)
        return whole, whole[_shared(whole, deps.tokenizer.render(empty, seen)) :]

    return await deps.tokenising.prompts.run(render, characters)


def _shared(one: str, other: str) -> int:
    """Return with how many characters both begin."""
    lengths = range(min(len(one), len(other)))
    return bisect_left(lengths, True, key=lambda length: one[: length + 1] != other[: length + 1])


async def _encoded(
    deps: ApiDependencies, texts: Sequence[str], param: str, *, special: bool
) -> list[tuple[int, ...]]:
    context = deps.settings.context_length
    for text in texts:
        if deps.tokenizer.least_tokens(text) <= context:
            check_length(len(text), most_characters(context), param)
    try:
        found = await deps.texts.base.codec.encode(
            deps.tokenising.prompts, texts, add_special_tokens=special, at_most=context
        )
    except TooManyTokens as error:
        raise context_exceeded(error.count, 0, context, at_least=error.at_least) from None
    return [tuple(ids) for ids in found]
