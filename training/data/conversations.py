"""Turns the messages of the chat formats into OpenAI's shape."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from manylora.training.data.example import Message, Source, Tool
from manylora.training.data.fields import as_text, kind_of, present, read_list
from manylora.training.data.json_keys import TwoValues, load_json
from manylora.training.data.marks import take_mark
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


@dataclass(frozen=True, slots=True)
class Turns:
    """Messages in OpenAI's shape."""

    messages: tuple[Message, ...]
    trained: tuple[bool, ...]
    """For each, whether the model learns to write it."""
    unread: tuple[str, ...] = ()
    """What the turns say and nothing was made of, such as ``messages[].name``."""

    def __add__(self, other: "Turns") -> "Turns":
        unread = dict.fromkeys((*self.unread, *other.unread))
        return Turns(self.messages + other.messages, self.trained + other.trained, tuple(unread))

    def untrained(self) -> "Turns":
        """Return the same as what is only read."""
        return Turns(self.messages, (False,) * len(self.messages), self.unread)


def read_messages(value: object, field: str, source: Source) -> Turns:
    """Read OpenAI's messages. The assistant's are trained unless a mark (``weight``, ``loss``, …) says no."""
    messages = []
    trained = []
    unread: dict[str, None] = {}
    for number, item in enumerate(read_list(value, field, source), 1):
        where = f"{field}[{number}]"
        message = _present(item, where, source)
        role = message.pop("role", None)
        if not isinstance(role, str) or role not in ROLES:
            raise InvalidData(f"{source}: {where} has the role {role!r}; expected {', '.join(sorted(ROLES))}")
        content = read_content(message.pop("content", ""), where, source)
        mark = take_mark(message, where, source)
        unread |= _unheard(mark, role, field)
        if role == "assistant":
            _read_calls(message, where, source)
        elif role == "function":
            role = "tool"
        messages.append({"role": role, "content": content, **message})
        trained.append(role == "assistant" and (mark is None or mark[1]))
    return Turns(tuple(messages), tuple(trained), tuple(unread))


def read_turns(value: object, field: str, source: Source) -> Turns:
    """Read ShareGPT's turns, from/value. Turns of the assistant before the user's first are left out."""
    messages: list[Message] = []
    trained = []
    unread: dict[str, None] = {}
    for number, item in enumerate(read_list(value, field, source), 1):
        where = f"{field}[{number}]"
        turn = _present(item, where, source)
        mark = take_mark(turn, where, source)
        speaker = turn.pop("from", None)
        role = ROLES_OF_SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise InvalidData(
                f"{source}: {where} is from {speaker!r}; expected one of {', '.join(ROLES_OF_SPEAKERS)}"
            )
        text = read_content(turn.pop("value", ""), where, source)
        unread |= _unheard(mark, role, field) | dict.fromkeys(f"{field}[].{name}" for name in turn)
        if role == "assistant" and all(message["role"] == "system" for message in messages):
            unread[f"{field}[] of the assistant before the user's first"] = None
            continue
        if speaker == "function_call":
            calls = [_function(call, where, source) for call in _calls(text, where, source)]
            messages.append({"role": role, "content": "", "tool_calls": calls})
        else:
            messages.append({"role": role, "content": text})
        trained.append(role == "assistant" and (mark is None or mark[1]))
    return Turns(tuple(messages), tuple(trained), tuple(unread))


def _unheard(mark: tuple[str, bool] | None, role: str, field: str) -> dict[str, None]:
    """Return the name of a mark that asks to train what is never trained: the assistant's words alone are."""
    return {f"{field}[].{mark[0]} of {role}": None} if mark and mark[1] and role != "assistant" else {}


def read_tools(value: object, source: Source) -> tuple[Tool, ...]:
    """Read descriptions of functions: OpenAI's tools, its older functions, or either as JSON text."""
    if value is None or value == "":
        return ()
    tools = []
    for item in read_list(value, "tools", source):
        tool = _present(item, "tools", source)
        tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tuple(tools)


def read_content(value: object, where: str, source: Source) -> str:
    """Read a message's text: a string or number, nothing, or a list of text parts."""
    if value is None:
        return ""
    text = as_text(value)
    if text is not None:
        return text
    if isinstance(value, list):
        texts = []
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else None
            words = as_text(part.get("text")) if isinstance(part, dict) and kind == "text" else None
            if words is None:
                raise InvalidData(
                    f"{source}: {where} has a part of type {kind!r}; only text can be trained on"
                )
            texts.append(words)
        return "".join(texts)
    raise InvalidData(f"{source}: {where} holds {kind_of(value)}; expected text")


def _read_calls(message: dict[str, Any], where: str, source: Source) -> None:
    """Bring an assistant's calls into one shape, with arguments as objects."""
    calls = read_list(message.pop("tool_calls", []), f"{where}.tool_calls", source)
    single = message.pop("function_call", None)
    found = [_present(call, f"{where}.tool_calls", source) for call in calls]
    found += [] if single is None else [{"function": single}]
    if found:
        message["tool_calls"] = [
            {**call, **_function(call.get("function", call), where, source)} for call in found
        ]


def _calls(text: str, where: str, source: Source) -> list[object]:
    try:
        value = load_json(text)
    except (ValueError, RecursionError) as error:
        said = getattr(error, "msg", str(error))
        raise InvalidData(f"{source}: {where} is a function call but isn't JSON: {said}") from error
    return value if isinstance(value, list) else [value]


def _function(value: object, where: str, source: Source) -> dict[str, Any]:
    function = _present(value, where, source)
    if not isinstance(function.get("name"), str):
        raise InvalidData(f"{source}: {where} calls a function without a name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        # Chat templates write arguments out as JSON, so that a string would be quoted twice.
        try:
            parsed = load_json(arguments)
        except TwoValues as error:
            raise InvalidData(f"{source}: {where} calls {function['name']}; its arguments: {error}") from None
        except (ValueError, RecursionError):
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _present(value: object, where: str, source: Source) -> dict[str, Any]:
    """Return an object's fields that aren't null."""
    if not isinstance(value, Mapping):
        raise InvalidData(f"{source}: {where} is {type(value).__name__}; expected an object")
    return dict(present(value))
