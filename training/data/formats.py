"""The formats of training data: recognises which one a file is in, and reads its rows as examples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from manylora.training.data.conversations import read_messages, read_tools, read_turns
from manylora.training.data.example import Example, Message, Source
from manylora.training.data.files import read_rows
from manylora.training.errors import InvalidArgument, InvalidData

ROWS_LOOKED_AT = 100
"""By which a file's format is recognised."""

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class DataFormat:
    """One way in which people write down training data."""

    name: str
    fields: str
    """What a row looks like, for people."""
    _is_sign_of: Callable[[Fields], bool]
    _read: Callable[[Fields, Source], Example]
    _accepts: Callable[[Fields], bool] | None = None
    """Where reading takes more than recognition: a file in Qwen's format may name one speaker otherwise."""

    def matches(self, value: Fields) -> bool:
        """Whether a row's fields speak for this format."""
        return self._is_sign_of(_present(value))

    def example(self, value: Fields, source: Source) -> Example:
        """Read a row. Raises InvalidData, which names the file and line."""
        fields = _present(value)
        if not (self._accepts or self._is_sign_of)(fields):
            found = ", ".join(map(repr, list(fields)[:8])) or "no fields"
            raise InvalidData(
                f"{source}: isn't in the format {self.name}: found {found}; expected {self.fields}"
            )
        return self._read(fields, source)


def recognise(path: str | Path) -> DataFormat:
    """Find a file's format by its first rows. Raises InvalidData where there is none, or none that all of them have."""
    first: tuple[int, DataFormat] | None = None
    broken: str | None = None
    for row in islice(read_rows(path), ROWS_LOOKED_AT):
        if row.value is None:
            broken = broken or f"{path}:{row.line}: {row.error}"
            continue
        found = _format_of(row.value, Source(str(path), row.line))
        if first is None:
            first = row.line, found
        elif {first[1].name, found.name} == {"qwen", "sharegpt"}:
            first = first[0], _BY_NAME["sharegpt"]  # one is a part of the other
        elif first[1] is not found:
            raise InvalidData(
                f"{path}: line {first[0]} is in the format {first[1].name}, line {row.line} in {found.name}; "
                "put them into files of their own"
            )
    if first is None:
        raise InvalidData(broken or f"{path}: there is no row in it")
    return first[1]


def format_named(name: str) -> DataFormat:
    """Look up a format. Raises InvalidArgument with the names that exist."""
    if name not in _BY_NAME:
        raise InvalidArgument(f"there is no data format {name!r}; there are {', '.join(_BY_NAME)}")
    return _BY_NAME[name]


def _format_of(value: Fields, source: Source) -> DataFormat:
    for candidate in FORMATS:
        if candidate.matches(value):
            return candidate
    found = ", ".join(map(repr, list(_present(value))[:8])) or "no fields"
    accepted = "; ".join(f"{one.name} ({one.fields})" for one in FORMATS)
    raise InvalidData(f"{source}: no known format has these fields: {found}; accepted are {accepted}")


def _present(value: Fields) -> Fields:
    return {key: item for key, item in value.items() if item is not None}


def _first_fields(value: object) -> Sequence[str]:
    """Return the field names of a list's first object."""
    return tuple(value[0]) if isinstance(value, list) and value and isinstance(value[0], Mapping) else ()


def _speakers(fields: Fields) -> set[object] | None:
    turns = fields.get("conversations")
    if not isinstance(turns, list) or not turns:
        return None
    if not all(isinstance(turn, Mapping) and "from" in turn for turn in turns):
        return None
    return {turn["from"] if isinstance(turn["from"], str) else None for turn in turns}


def _is_qwen(fields: Fields) -> bool:
    speakers = _speakers(fields)
    return speakers is not None and speakers <= {"system", "user", "assistant"}


def _is_sharegpt(fields: Fields) -> bool:
    return "from" in _first_fields(fields.get("conversations"))


def _messages_field(fields: Fields) -> str | None:
    for name in ("messages", "conversations"):
        value = fields.get(name)
        if "role" in _first_fields(value) or (name == "messages" and isinstance(value, str)):
            return name
    return None


def _is_text_or_messages(value: object) -> bool:
    return isinstance(value, str) or "role" in _first_fields(value)


def _read_sharegpt(fields: Fields, source: Source) -> Example:
    messages = read_turns(fields["conversations"], "conversations", source)
    system = fields.get("system")
    if isinstance(system, str) and system and not (messages and messages[0]["role"] == "system"):
        messages = ({"role": "system", "content": system}, *messages)
    return Example(
        messages=messages,
        trained=tuple(message["role"] == "assistant" for message in messages),
        tools=read_tools(fields.get("tools"), source),
        text=None,
        source=source,
    )


def _read_openai(fields: Fields, source: Source) -> Example:
    field = _messages_field(fields)
    assert field is not None
    messages, trained = read_messages(fields[field], field, source)
    tools = read_tools(fields.get("tools", fields.get("functions")), source)
    return Example(messages, trained, tools, None, source)


def _read_alpaca(fields: Fields, source: Source) -> Example:
    texts = {name: _text(fields, name, source) for name in ("system", "instruction", "input", "output")}
    messages: list[Message] = []
    if texts["system"]:
        messages.append({"role": "system", "content": texts["system"]})
    for pair in fields.get("history", ()):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(t, str) for t in pair)):
            raise InvalidData(f"{source}: history isn't a list of [question, answer]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = "\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": texts["output"]}]
    trained = tuple(message["role"] == "assistant" for message in messages)
    return Example(tuple(messages), trained, (), None, source)


def _read_completion(fields: Fields, source: Source) -> Example:
    """Strings become a user's and an assistant's message; of message lists, the completion alone is trained."""
    prompt, completion = fields["prompt"], fields["completion"]
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answered = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    before, _ = read_messages(asked, "prompt", source)
    after, trained = read_messages(answered, "completion", source)
    tools = read_tools(fields.get("tools"), source)
    return Example(before + after, (False,) * len(before) + trained, tools, None, source)


def _read_text(fields: Fields, source: Source) -> Example:
    return Example((), (), (), _text(fields, "text", source), source)


def _text(fields: Fields, name: str, source: Source) -> str:
    value = fields.get(name, "")
    if not isinstance(value, str):
        raise InvalidData(f"{source}: {name} holds {type(value).__name__}; expected text")
    return value


FORMATS: Sequence[DataFormat] = (
    DataFormat(
        "qwen", "conversations: [{from: user|assistant, value}]", _is_qwen, _read_sharegpt, _is_sharegpt
    ),
    DataFormat(
        "sharegpt",
        "conversations: [{from: human|gpt|system|tool|…, value}]",
        _is_sharegpt,
        _read_sharegpt,
    ),
    DataFormat(
        "messages",
        "messages: [{role: system|user|assistant|tool, content}]",
        lambda fields: _messages_field(fields) is not None,
        _read_openai,
    ),
    DataFormat(
        "alpaca",
        "instruction, input (may be missing), output",
        lambda fields: "instruction" in fields and "output" in fields,
        _read_alpaca,
    ),
    DataFormat(
        "prompt-completion",
        "prompt, completion",
        lambda fields: (
            _is_text_or_messages(fields.get("prompt")) and _is_text_or_messages(fields.get("completion"))
        ),
        _read_completion,
    ),
    DataFormat("text", "text", lambda fields: isinstance(fields.get("text"), str), _read_text),
)
_BY_NAME: Mapping[str, DataFormat] = {one.name: one for one in FORMATS}
