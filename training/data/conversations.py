"""Turns the messages of the chat formats into OpenAI's shape."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from manylora.training.data.example import Message, Source, Tool
from manylora.training.errors import InvalidData

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
ROLES_OF_SPEAKERS: Mapping[str, str] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
"""ShareGPT's names for who speaks, and Qwen's, which are a part of them."""


def read_messages(value: object, field: str, source: Source) -> tuple[tuple[Message, ...], tuple[bool, ...]]:
    """Read OpenAI's messages; the second result says for each whether it is trained.

    ``weight`` 0 keeps an assistant's message out of the loss.
    """
    messages = []
    trained = []
    for number, item in enumerate(_list(value, field, source), 1):
        where = f"{field}[{number}]"
        message = _present(item, where, source)
        role = message.pop("role", None)
        if role not in ROLES:
            raise InvalidData(f"{source}: {where} has the role {role!r}; expected {', '.join(sorted(ROLES))}")
        content = read_content(message.pop("content", ""), where, source)
        weight = message.pop("weight", 1)
        if weight not in (0, 1):
            raise InvalidData(f"{source}: {where} has the weight {weight!r}; it is 0 or 1")
        if role == "assistant":
            _read_calls(message, where, source)
        elif role == "function":
            role = "tool"
        messages.append({"role": role, "content": content, **message})
        trained.append(role == "assistant" and weight == 1)
    return tuple(messages), tuple(trained)


def read_turns(value: object, field: str, source: Source) -> tuple[Message, ...]:
    """Read ShareGPT's turns, from/value. Turns of the assistant before the user's first are left out."""
    messages: list[Message] = []
    for number, item in enumerate(_list(value, field, source), 1):
        where = f"{field}[{number}]"
        turn = _present(item, where, source)
        speaker = turn.get("from")
        role = ROLES_OF_SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise InvalidData(
                f"{source}: {where} is from {speaker!r}; expected one of {', '.join(ROLES_OF_SPEAKERS)}"
            )
        text = read_content(turn.get("value", ""), where, source)
        if role == "assistant" and all(message["role"] == "system" for message in messages):
            continue
        if speaker == "function_call":
            calls = [_function(call, where, source) for call in _calls(text, where, source)]
            messages.append({"role": role, "content": "", "tool_calls": calls})
        else:
            messages.append({"role": role, "content": text})
    return tuple(messages)


def read_tools(value: object, source: Source) -> tuple[Tool, ...]:
    """Read descriptions of functions: OpenAI's tools, its older functions, or either as JSON text."""
    if value is None or value == "":
        return ()
    tools = []
    for item in _list(value, "tools", source):
        tool = _present(item, "tools", source)
        tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tuple(tools)


def read_content(value: object, where: str, source: Source) -> str:
    """Read a message's text: a string, nothing, or a list of text parts."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        texts = []
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else None
            if not isinstance(part, dict) or kind != "text" or not isinstance(part.get("text"), str):
                raise InvalidData(
                    f"{source}: {where} has a part of type {kind!r}; only text can be trained on"
                )
            texts.append(part["text"])
        return "".join(texts)
    raise InvalidData(f"{source}: {where} holds {type(value).__name__}; expected text")


def _read_calls(message: dict[str, Any], where: str, source: Source) -> None:
    """Bring an assistant's calls into one shape, with arguments as objects."""
    calls = _list(message.pop("tool_calls", []), f"{where}.tool_calls", source)
    single = message.pop("function_call", None)
    found = [_present(call, f"{where}.tool_calls", source) for call in calls]
    found += [] if single is None else [{"function": single}]
    if found:
        message["tool_calls"] = [
            {**call, **_function(call.get("function", call), where, source)} for call in found
        ]


def _calls(text: str, where: str, source: Source) -> list[object]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidData(f"{source}: {where} is a function call but isn't JSON: {error.msg}") from error
    return value if isinstance(value, list) else [value]


def _function(value: object, where: str, source: Source) -> dict[str, Any]:
    function = _present(value, where, source)
    if not isinstance(function.get("name"), str):
        raise InvalidData(f"{source}: {where} calls a function without a name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        # Chat templates write arguments out as JSON, so that a string would be quoted twice.
        try:
            parsed = json.loads(arguments)
        except json.JSONDecodeError:
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _list(value: object, field: str, source: Source) -> Sequence[object]:
    """Return a list that may be written as JSON text, as tables have it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise InvalidData(f"{source}: {field} is text that isn't JSON: {error.msg}") from error
    if not isinstance(value, list):
        raise InvalidData(f"{source}: {field} isn't a list")
    return value


def _present(value: object, where: str, source: Source) -> dict[str, Any]:
    """Return an object's fields that aren't null: Parquet gives every row every field."""
    if not isinstance(value, Mapping):
        raise InvalidData(f"{source}: {where} is {type(value).__name__}; expected an object")
    return {key: item for key, item in value.items() if item is not None}
