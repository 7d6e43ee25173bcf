"""What a chat's template knows of tools and thoughts: how its prompt is written, how its answers are read and held."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from manylora.server.api.asks import Ask, ChatPrompt
from manylora.server.chat import reasoning
from manylora.server.chat.formats.format import Format, ToolsRefused
from manylora.server.chat.reading import NoFormat, Reading, format_of, takes_tools
from manylora.server.engine.grammar import Grammar, GrammarKind
from manylora.server.errors import InvalidRequest
from manylora.server.tokenizer import Vocabulary

_SHORT = 9
"""Letters and digits of a call's id in Mistral's templates."""


@dataclass(frozen=True, slots=True)
class Talk:
    """A chat for one model's template."""

    prompt: ChatPrompt
    """With what the template is told of tools."""
    template: str
    format: Format | None
    """How calls in its answers are written; None: nothing in them is a call."""

    @classmethod
    def of(cls, prompt: ChatPrompt, template: str, vocabulary: Vocabulary, parser: str | None) -> "Talk":
        """Return a chat as the template takes it; ``parser`` is --tool-parser.

        Raises InvalidRequest for what the template doesn't know.
        """
        _check_calls(prompt, template)
        variables = {**_effort(prompt, template), **prompt.variables}
        if not prompt.tools.tools:
            return cls(replace(prompt, variables=variables), template, None)
        if not takes_tools(template):
            raise InvalidRequest(
                "the model's chat template has no place for tools: ask another model, or an adapter whose template "
                "has one",
                param="tools",
            )
        variables["tools"] = [tool.for_template() for tool in prompt.tools.tools]
        try:
            written = format_of(template, parser, vocabulary.control_tokens)
        except NoFormat as error:
            if prompt.tools.mode != "none":
                raise InvalidRequest(str(error), param="tools") from error
            return cls(replace(prompt, variables=variables), template, None)
        messages = _with_short_ids(prompt.messages) if written.short_ids else prompt.messages
        told = replace(prompt, messages=messages, variables=variables)
        return cls(told, template, None if prompt.tools.mode == "none" else written)

    def reading(self, rendered: str) -> Reading:
        """Return how answers to the rendered prompt are read."""
        thinks = reasoning.known_by(self.template) and not self.prompt.continue_final_message
        opened = thinks and reasoning.opened_by(rendered)
        return Reading(self.format, self.prompt.tools, thinks=thinks, opened=opened)

    def thought_ends_with(self, rendered: str) -> str | None:
        """Return what ends the thoughts that are to come before the answer; None: none are."""
        if self.prompt.continue_final_message:
            return None
        will = reasoning.will_think(self.template, rendered, self.prompt.variables)
        return reasoning.CLOSE if will else None


def _check_calls(prompt: ChatPrompt, template: str) -> None:
    """Refuse calls of earlier answers that the template would leave out without a word."""
    calls = (place for place, message in enumerate(prompt.messages) if message.get("tool_calls"))
    place = next(calls, None)
    if place is not None and "tool_calls" not in template:
        param = f"messages.{place}.tool_calls" if prompt.as_sent else prompt.param
        raise InvalidRequest(
            f"{param}: the model's chat template has no place for calls of tools", param=param
        )


def _effort(prompt: ChatPrompt, template: str) -> Mapping[str, object]:
    """Return the template's variables for how much is to be thought."""
    effort = prompt.reasoning_effort
    if effort is None:
        return {}
    known = {reasoning.EFFORT: effort} if reasoning.EFFORT in template else {}
    if effort == "none":
        return {reasoning.SWITCH: False, **known}
    if not known and not prompt.effort_if_known:
        raise InvalidRequest(
            'reasoning_effort: the model\'s chat template knows no levels; "none" may be sent, and '
            "chat_template_kwargs with what it knows",
            param="reasoning_effort",
        )
    return known


def _with_short_ids(messages: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """Return messages whose calls have ids that Mistral's templates take; those of other models' calls are replaced."""
    found: list[Mapping[str, object]] = []
    for message in messages:
        made = dict(message)
        calls = message.get("tool_calls")
        if isinstance(calls, list):
            made["tool_calls"] = [{**call, "id": _short(call["id"])} for call in calls]
        if isinstance(message.get("tool_call_id"), str):
            made["tool_call_id"] = _short(str(message["tool_call_id"]))
        found.append(made)
    return found


def _short(call_id: str) -> str:
    if len(call_id) == _SHORT and call_id.isascii() and call_id.isalnum():
        return call_id
    return hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).hexdigest()[:_SHORT]


def held(
    ask: Ask, reading: Reading, thought: str | None, controls: Mapping[str, int], *, loose: bool
) -> Grammar | None:
    """Return what the answers are held to, by the request's grammar and its tools; None: nothing.

    ``loose``: any object will do as arguments of a tool that isn't strict. Raises InvalidRequest.
    """
    grammar = ask.grammar
    if reading.format is None or not reading.use.callable:
        return None if grammar is None else replace(grammar, after=thought)
    answer = None if grammar is None else _inside(grammar)
    try:
        text = reading.grammar(controls, answer, loose=loose)
    except ToolsRefused as error:
        param = reading.use.by_name[error.tool].param
        raise InvalidRequest(f"{param}: {error}", param=param) from error
    return None if text is None else Grammar(GrammarKind.LARK, text, after=thought, param="tools")


def _inside(grammar: Grammar) -> str:
    """Return a grammar as a part of another."""
    if grammar.kind is GrammarKind.JSON_SCHEMA:
        return f"%json {grammar.text}"
    if grammar.kind is GrammarKind.LARK:
        return f"%lark {{\n{grammar.text}\n}}"
    raise InvalidRequest(
        f"{grammar.param} doesn't go with tools: an answer may be a call, or JSON by a schema",
        param=grammar.param,
    )
