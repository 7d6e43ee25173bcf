"""What a family's format is: marks, a reader, and a grammar in llguidance's dialect of Lark."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias
from uuid import uuid4

from manylora.server.chat.fold import Reader, Sink
from manylora.server.chat.tools import Tool, ToolUse

Spell: TypeAlias = Callable[[str], str]
"""Returns how Lark names a text that may be a control token."""


class ToolsRefused(Exception):
    """Tools that this model's format can't hold. The message says why; ``tool`` is the tool's place."""

    def __init__(self, tool: str, message: str) -> None:
        super().__init__(message)
        self.tool = tool


@dataclass(frozen=True, slots=True)
class Calls:
    """The part of a grammar that is an answer's calls."""

    trigger: str
    """What a call begins with: a control token or a text."""
    body: str
    """Lark: what follows the trigger."""
    rules: Sequence[str]
    """Lark: what the body refers to."""
    repeats: bool = True
    """Whether several calls are as many triggers; else they are inside the body, and it ends the answer."""
    between: str = ""
    """Text between two calls that repeat."""
    closed: str = ""
    """A regular expression: what text beside calls mustn't be, besides holding the trigger."""
    leads: bool = False
    """Whether an answer either begins with a call or has none; its text may hold the trigger then."""


@dataclass(frozen=True, slots=True)
class Format:
    """How a family writes calls."""

    name: str
    marks: Sequence[str]
    """What has a meaning, and may be a control token, which has no text of its own."""
    read: Callable[[Sink, ToolUse], Reader[None]]
    calls: Callable[[ToolUse, Spell, bool], Calls]
    """Returns the grammar; True: any object will do where a tool isn't strict."""
    mint: Callable[[], str] = lambda: f"call_{uuid4().hex[:24]}"
    """Makes a call's id."""
    short_ids: bool = False
    """Whether templates take ids of exactly nine letters and digits."""


def literal(text: str) -> str:
    """Return a text as Lark spells it."""
    return json.dumps(text, ensure_ascii=False)


def arguments(tool: Tool, *, loose: bool) -> Mapping[str, Any]:
    """Return what a tool's arguments are held to; ``loose``: any object will do for one that isn't strict."""
    return {"type": "object"} if loose and not (tool.held or tool.custom) else tool.schema


def schema(value: Mapping[str, Any] | bool) -> str:
    """Return a JSON schema as Lark takes it in."""
    return "%json " + json.dumps(value, ensure_ascii=False)


def json_bodies(
    use: ToolUse, before: Callable[[str], str], after: str, *, loose: bool = False
) -> tuple[str, list[str]]:
    """Return Lark for one of the tools' calls in JSON, and its rules.

    ``before`` is what stands before a tool's arguments, ``after`` what stands behind them.
    """
    rules, names = [], []
    for number, tool in enumerate(use.callable):
        names.append(f"call_{number}")
        if tool.raw:
            assert tool.grammar is not None
            opens, closes = before(tool.name) + '{"input": "', '"}' + after
            held = f"%lark {{\n{tool.grammar.definition}\n}}"
            rules.append(f"call_{number}: {literal(opens)} input_{number} {literal(closes)}")
            rules.append(f"input_{number}: {held}")
        else:
            held = schema(arguments(tool, loose=loose))
            rules.append(f"call_{number}: {literal(before(tool.name))} arguments_{number} {literal(after)}")
            rules.append(f"arguments_{number}: {held}")
    return " | ".join(names), rules


def grammar(calls: Calls, use: ToolUse, spell: Spell, answer: str | None = None) -> str:
    """Return the grammar of an answer: calls where one is required, else text, calls, or both.

    Where no call can follow the first one nothing can: text could begin another, spelled a little otherwise.
    ``answer`` is Lark for what the answer must be where it calls nothing; None: any text.
    """
    trigger, token = spell(calls.trigger), not spell(calls.trigger).startswith('"')
    several = use.parallel and calls.repeats
    rules = ["call: " + calls.body, *calls.rules]
    more = f" ({literal(calls.between)} {trigger} call)*" if calls.between else f" ({trigger} call)*"
    all_calls = f"{trigger} call" + (more if several else "")
    if use.mode == "required":
        start = [f"start: {all_calls}"]
    elif answer is not None:
        start = ["start: calls | answer", f"calls: {all_calls}", f"answer: {answer}"]
    else:
        shut = [] if token or calls.leads else [f"(?s:.*){regex(calls.trigger)}(?s:.*)"]
        shut += [calls.closed] if calls.closed else []
        text = "/(?s:.*)/" + "".join(f" & ~/{each}/" for each in shut)
        if calls.leads:
            return "\n".join([f"start: {all_calls} | TEXT", f"TEXT: {text}", *rules]) + "\n"
        before = f"TEXT {trigger}" if token else "free"
        answers = f"({before} call)* TEXT" if several else f"{before} call | TEXT"
        start = [f"start: {answers}", f"TEXT: {text}"]
        if not token:
            start.append(f"free[lazy]: /(?s:.*){regex(calls.trigger)}/")
    return "\n".join([*start, *rules]) + "\n"


def regex(text: str) -> str:
    """Return a text as a regular expression between slashes."""
    return "".join(c if c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)
