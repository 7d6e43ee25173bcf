"""Mistral: [TOOL_CALLS] and a list of calls in JSON; since tokenizer version 11 [TOOL_CALLS]name[ARGS]{…} for each."""

import random
import string

from manylora.server.chat.fold import Ended, NotACall, Reader, Sink, give_back, one, solid, until
from manylora.server.chat.formats.format import Calls, Format, Spell, arguments, json_bodies, literal, schema
from manylora.server.chat.json_calls import RawEnd, call, named
from manylora.server.chat.tools import ToolUse

OPEN, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
LIST_END, RAW_END = RawEnd('"}}]', is_last=True), RawEnd('"}', is_last=True)
_LETTERS = string.ascii_letters + string.digits


def mint() -> str:
    """Return a call's id: Mistral's templates refuse all but nine letters and digits."""
    return "".join(random.choices(_LETTERS, k=9))


def read(sink: Sink, use: ToolUse) -> Reader[None]:
    """Read an answer in either form."""
    first = ""
    while mark := (yield from until(sink, (OPEN,), first)):
        raw, calls, first = [mark], sink.calls, ""
        try:
            character = yield from solid(raw)
            if character == "[":
                yield from _list(sink, raw)
            elif character == "{":
                yield from call(sink, raw, RAW_END)
            else:
                yield from _named(sink, raw, character)
        except NotACall:
            give_back(sink, raw, calls)
        except Ended:  # of a call behind another one nothing is shown
            give_back(sink, raw, 0)
            return


def _list(sink: Sink, raw: list[str]) -> Reader[None]:
    while (character := (yield from solid(raw))) != "]":
        if character == "{":
            yield from call(sink, raw, LIST_END)
        elif character != ",":
            raise NotACall


def _named(sink: Sink, raw: list[str], character: str) -> Reader[None]:
    """Read name[ARGS]{…}, between which an id may stand."""
    name = ""
    while character not in "[{":
        name += character
        character = yield from one(raw)
    while character == "[":
        tag = character
        while not tag.endswith("]"):
            tag += yield from one(raw)
        character = yield from solid(raw)
        if tag == CALL_ID:  # the model's own
            while character not in "[{":
                character = yield from one(raw)
        elif tag != ARGS:
            raise NotACall
    if not name.strip() or character != "{":
        raise NotACall
    yield from named(sink, raw, name.strip(), RAW_END)


def old_calls(use: ToolUse, spell: Spell, loose: bool) -> Calls:
    """Return the grammar of a list of calls."""
    body, rules = json_bodies(use, lambda name: f'{{"name": "{name}", "arguments": ', "}", loose=loose)
    several = use.parallel and not any(tool.raw for tool in use.callable)
    more = f' (", " ({body}))*' if several else ""
    return Calls(OPEN, f'"[" ({body}){more} "]"', rules, repeats=False)


def new_calls(use: ToolUse, spell: Spell, loose: bool) -> Calls:
    """Return the grammar of calls by their names."""
    rules, names = [], []
    for number, tool in enumerate(use.callable):
        names.append(f"call_{number}")
        begins = f"call_{number}: {literal(tool.name)} {spell(ARGS)}"
        if tool.raw:
            assert tool.grammar is not None
            rules.append(f'{begins} "{{\\"input\\": \\"" input_{number} "\\"}}"')
            rules.append(f"input_{number}: %lark {{\n{tool.grammar.definition}\n}}")
        else:
            rules.append(f"{begins} arguments_{number}")
            rules.append(f"arguments_{number}: {schema(arguments(tool, loose=loose))}")
    return Calls(OPEN, " | ".join(names), rules, repeats=not any(tool.raw for tool in use.callable))


OLD = Format("mistral", (OPEN,), read, old_calls, mint, short_ids=True)
NEW = Format("mistral", (OPEN, ARGS, CALL_ID), read, new_calls, mint, short_ids=True)
