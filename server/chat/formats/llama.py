"""Llama 3.x: an answer that is a call is JSON from its beginning, after <|python_tag|> or not."""

import ast
import json

from manylora.server.chat.fold import SPACE, Ended, NotACall, Reader, Sink, give_back, one, plain, solid
from manylora.server.chat.formats.format import Calls, Format, Spell, json_bodies
from manylora.server.chat.json_calls import RawEnd, call
from manylora.server.chat.tools import ToolUse

TAG = "<|python_tag|>"
RAW_END = RawEnd('"}}', is_last=True)


def read(sink: Sink, use: ToolUse) -> Reader[None]:
    """Read an answer. Without the tag only JSON that names a tool of the request is a call."""
    raw: list[str] = []
    tagged = False
    calls = 0
    try:
        while True:
            character = yield from solid(raw)
            if character == TAG[0] and not tagged and not sink.calls:
                yield from _rest(raw, TAG[1:])
                tagged = True
                continue
            if character == ";" and sink.calls:
                continue
            if character != "{":
                raise NotACall
            calls = sink.calls
            yield from call(sink, raw, RAW_END, known=None if tagged else set(sink.tools))
            raw.clear()
            calls = sink.calls
    except NotACall:
        if not (tagged and not sink.calls):
            give_back(sink, raw, calls)
            yield from plain(sink)
            return
    except Ended:
        if "".join(raw).strip(SPACE + ";") or not sink.calls:
            give_back(sink, raw, calls)
        return
    yield from _python(sink, raw)


def _rest(raw: list[str], rest: str) -> Reader[None]:
    for expected in rest:
        if (yield from one(raw)) != expected:
            raise NotACall


def _python(sink: Sink, raw: list[str]) -> Reader[None]:
    """Read to the end what follows the tag and isn't JSON: name.call(key="value"), or else text."""
    while character := (yield):
        raw.append(character)
    written = "".join(raw)
    found = _built_in(written.strip().removeprefix(TAG).strip())
    if found is None:
        sink.content(written)
        return
    name, arguments = found
    sink.begin(name)
    sink.arguments(json.dumps(arguments, ensure_ascii=False))


def _built_in(code: str) -> tuple[str, dict[str, object]] | None:
    """Return the tool and the arguments that Llama's way to call a built-in tool names."""
    try:
        expression = ast.parse(code, mode="eval").body
        if not isinstance(expression, ast.Call) or expression.args:
            return None
        called = expression.func
        if not isinstance(called, ast.Attribute) or called.attr != "call":
            return None
        if not isinstance(called.value, ast.Name):
            return None
        arguments = {each.arg: ast.literal_eval(each.value) for each in expression.keywords if each.arg}
        json.dumps(arguments)
        return called.value.id, arguments
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def calls(use: ToolUse, spell: Spell, loose: bool) -> Calls:
    """Return the grammar of a call: one, for Llama's own template refuses several in a conversation."""
    body, rules = json_bodies(use, lambda name: f'"name": "{name}", "parameters": ', "}", loose=loose)
    # What begins like a call must be one: a brace is a token of its own to the grammar, which doesn't look ahead.
    closed = r"[ \n\r\t]*(<\|python_tag\|>|\{)(?s:.*)"
    return Calls("{", body, rules, repeats=False, closed=closed, leads=True)


FORMAT = Format("llama3_json", (TAG,), read, calls)
