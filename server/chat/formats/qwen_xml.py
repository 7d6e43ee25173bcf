"""Qwen3-Coder and Qwen3.5: <tool_call><function=name><parameter=key>value</parameter></function></tool_call>.

Values stand as they are, not as JSON: a tool's schema says which of them are texts.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from manylora.server.chat.fold import Ended, NotACall, Reader, Sink, give_back, one, solid, until
from manylora.server.chat.formats.format import Calls, Format, Spell, ToolsRefused, literal, regex, schema
from manylora.server.chat.tools import INPUT, Tool, ToolUse

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, PARAMETER = "<function=", "<parameter="
FUNCTION_END, PARAMETER_END = "</function>", "</parameter>"
_VALUE_ENDS = ("\n" + PARAMETER_END, PARAMETER_END, "\n" + PARAMETER, "\n" + FUNCTION_END)
"""Models leave the closing tag out now and then."""
_REFERENCE, _DEFINED = re.compile(r'"\$ref": "([^"]*)"'), re.compile(r"#/(\$defs|definitions)/")
_TEXT_LIMITS = ("pattern", "format", "minLength", "maxLength")


def read(sink: Sink, use: ToolUse) -> Reader[None]:
    """Read an answer."""
    inside, first = False, ""
    while mark := (yield from until(sink, (OPEN, FUNCTION, CLOSE) if inside else (OPEN, FUNCTION), first)):
        first = ""
        if mark == CLOSE:
            inside = False
            continue
        raw, calls = [mark], sink.calls
        try:
            if mark == OPEN:
                yield from _tag(raw, (FUNCTION,))
            inside = True
            yield from _function(sink, raw)
        except NotACall:
            inside = sink.calls > calls
            give_back(sink, raw, calls)
        except Ended:  # of a call behind another one nothing is shown
            give_back(sink, raw, 0)
            return


def _tag(raw: list[str], tags: tuple[str, ...]) -> Reader[str]:
    """Read one of ``tags``. Raises NotACall for anything else."""
    held = yield from solid(raw)
    while held not in tags:
        if not any(tag.startswith(held) for tag in tags):
            raise NotACall
        held += yield from one(raw)
    return held


def _name(raw: list[str]) -> Reader[str]:
    name = ""
    while (character := (yield from one(raw))) != ">":
        if character in "<\n":
            raise NotACall
        name += character
    return name.strip()


def _function(sink: Sink, raw: list[str]) -> Reader[None]:
    """Read a call after <function=, and tell its parameters as a JSON object."""
    name = yield from _name(raw)
    if not name:
        raise NotACall
    tool = sink.begin(name)
    told: set[str] = set()
    tags = (PARAMETER, FUNCTION_END, CLOSE)
    tag = yield from _tag(raw, tags)
    while tag == PARAMETER:
        key = yield from _name(raw)
        end = yield from _parameter(sink, raw, tool, key, told)
        tag = end.strip() if end.strip() != PARAMETER_END else (yield from _tag(raw, tags))
    if tool is None or not tool.custom:
        sink.arguments("}" if told else "{}")


def _parameter(sink: Sink, raw: list[str], tool: Tool | None, key: str, told: set[str]) -> Reader[str]:
    """Read a value, and return what ended it."""
    if key in told or (tool is not None and tool.custom and key != INPUT):
        return (yield from _value(raw, lambda text: None))
    separator = ", " if told else "{"
    told.add(key)
    if tool is not None and tool.custom:
        return (yield from _value(raw, sink.arguments))
    sink.arguments(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
    kinds = _kinds(tool, key)
    if kinds == {"string"}:
        sink.arguments('"')
        end = yield from _value(raw, lambda text: sink.arguments(json.dumps(text, ensure_ascii=False)[1:-1]))
        sink.arguments('"')
        return end
    parts: list[str] = []
    end = yield from _value(raw, parts.append)
    sink.arguments(_as_json("".join(parts), kinds))
    return end


def _value(raw: list[str], emit: Any) -> Reader[str]:
    """Emit a value, without the line ends around it; return what ended it."""
    held, begun = "", False
    while True:
        character = yield from one(raw)
        if not begun:
            begun = True
            if character == "\n":
                continue
        held += character
        while held and not any(end.startswith(held) for end in _VALUE_ENDS):
            emit(held[0])
            held = held[1:]
        if held in _VALUE_ENDS:
            return held


def _kinds(tool: Tool | None, key: str) -> set[str]:
    """Return the JSON types that a parameter may have; none: any."""
    if tool is None:
        return set()
    whole = tool.schema
    properties = whole.get("properties")
    found = properties.get(key) if isinstance(properties, Mapping) else None
    return _types(found, whole, 8)


def _types(found: object, whole: Mapping[str, Any], depth: int) -> set[str]:
    if not isinstance(found, Mapping) or not depth:
        return set()
    reference = found.get("$ref")
    if isinstance(reference, str):
        return _types(_referred(reference, whole), whole, depth - 1)
    kind = found.get("type")
    if isinstance(kind, str):
        return {kind}
    if isinstance(kind, list):
        return {each for each in kind if isinstance(each, str)}
    options = found.get("anyOf") or found.get("oneOf")
    if isinstance(options, list):
        of_each = [_types(option, whole, depth - 1) for option in options]
        return set().union(*of_each) if all(of_each) else set()
    values = found.get("enum") if "enum" in found else [found["const"]] if "const" in found else []
    if isinstance(values, list) and values and all(isinstance(value, str) for value in values):
        return {"string"}
    return set()


def _referred(reference: str, whole: Mapping[str, Any]) -> object:
    place: object = whole
    for part in reference.removeprefix("#/").split("/") if reference.startswith("#/") else ():
        place = place.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(place, Mapping) else None
    return place


def _as_json(text: str, kinds: set[str]) -> str:
    """Return a value that isn't simply a text as JSON; Python's words for truth are what templates write."""
    word = text.strip()
    spelled = {"True": "true", "False": "false", "None": "null"}.get(word, word)
    if "string" in kinds and not (spelled == "null" and "null" in kinds):
        return json.dumps(text, ensure_ascii=False)
    try:
        json.loads(spelled, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    return spelled


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def calls(use: ToolUse, spell: Spell, loose: bool) -> Calls:
    """Return the grammar of calls. Raises ToolsRefused."""
    names, rules = [], []
    for number, tool in enumerate(use.callable):
        names.append(f"call_{number}")
        parts: list[str] = []
        for place, (optional, held) in enumerate(_parameters(tool, loose)):
            parts.append(f"value_{number}_{place}{optional}")
            rules.append(f"value_{number}_{place}: {held}")
        opens, closes = literal(f"\n{FUNCTION}{tool.name}>\n"), literal(f"{FUNCTION_END}\n")
        rules.append(f"call_{number}: {' '.join([opens, *parts, closes])}")
    ends = "|".join(map(regex, _VALUE_ENDS))
    rules.append(f"TEXT_VALUE: /(?s:.*)/ & ~/(?s:.*)({ends})(?s:.*)/")
    shut = f"(?s:.*){regex(FUNCTION)}(?s:.*)"
    return Calls(OPEN, f"({' | '.join(names)}) {spell(CLOSE)}", rules, between="\n", closed=shut)


def _parameters(tool: Tool, loose: bool) -> list[tuple[str, str]]:
    """Return each parameter as ("", "?" or "*", Lark), in the schema's order."""
    whole = tool.schema
    properties = whole.get("properties", {})
    if not isinstance(properties, Mapping) or any(
        key in whole for key in ("anyOf", "oneOf", "allOf", "$ref")
    ):
        if loose and not tool.held:
            opens, closes = literal(PARAMETER), literal(f"\n{PARAMETER_END}\n")
            return [("*", f'{opens} /[^<>\\n]+/ ">\\n" TEXT_VALUE {closes}')]
        raise ToolsRefused(
            tool.name, "this model writes parameters one by one: give an object with properties"
        )
    required = whole.get("required", ())
    found = []
    for key, value in properties.items():
        if not key or any(character in key for character in "<>\n"):
            raise ToolsRefused(tool.name, f"this model can't write a parameter of the name {key!r}")
        opens, closes = literal(f"{PARAMETER}{key}>\n"), literal(f"\n{PARAMETER_END}\n")
        held = f"{opens} {_held(tool, key, value, loose)} {closes}"
        found.append(("" if key in required else "?", held))
    return found


def _held(tool: Tool, key: str, value: object, loose: bool) -> str:
    """Return Lark for a parameter's value."""
    if tool.grammar is not None:
        if tool.raw:
            return f"%lark {{\n{tool.grammar.definition}\n}}"
        return "/" + re.sub(r"(?<!\\)/", r"\/", tool.grammar.definition).replace("\n", "\\n") + "/"
    kinds = _kinds(tool, key)
    if not isinstance(value, Mapping) or not value:
        return "TEXT_VALUE"
    if "string" in kinds:
        return _held_text(tool, key, value)
    if loose and not tool.held:
        return "TEXT_VALUE"
    away = next(
        (to for to in _REFERENCE.findall(json.dumps(dict(tool.schema))) if not _DEFINED.match(to)), None
    )
    if away is not None:
        raise ToolsRefused(tool.name, f"{key}: $ref {away} leads out of a parameter: put it under $defs")
    definitions = {name: tool.schema[name] for name in ("$defs", "definitions") if name in tool.schema}
    return schema({**value, **definitions})


def _held_text(tool: Tool, key: str, value: Mapping[str, Any]) -> str:
    reference = value.get("$ref")
    if isinstance(reference, str):
        referred = _referred(reference, tool.schema)
        value = referred if isinstance(referred, Mapping) else {}
    options = value.get("anyOf") or value.get("oneOf")
    if isinstance(options, list):
        texts = [each for each in options if "string" in _types(each, tool.schema, 8)]
        held = [_held_text(tool, key, each) for each in texts]
        nulls = ['"null"'] if "null" in _kinds(tool, key) else []
        return "(" + " | ".join(dict.fromkeys([*held, *nulls])) + ")"
    values = value.get("enum") if "enum" in value else [value["const"]] if "const" in value else None
    if isinstance(values, list) and values:
        spelled = ["null" if each is None else each for each in values]
        if all(isinstance(each, str) and each for each in spelled):
            return "(" + " | ".join(map(literal, spelled)) + ")"
    limit = next((word for word in _TEXT_LIMITS if word in value), None)
    if tool.strict and limit is not None:
        raise ToolsRefused(
            tool.name, f"{key}: {limit} can't be held in this model's format, where texts stand unquoted"
        )
    return "TEXT_VALUE"


FORMAT = Format("qwen3_coder", (OPEN, CLOSE), read, calls)
