"""The formats of training data: recognises which one a file is in, and reads its rows as examples."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from manylora.training.data.columns import Columns
from manylora.training.data.conversations import Turns, read_messages, read_tools, read_turns
from manylora.training.data.example import Example, Message, Source
from manylora.training.data.fields import (
    Fields,
    as_text,
    check_characters,
    is_textual,
    kind_of,
    present,
    read_list,
)
from manylora.training.data.files import read_rows
from manylora.training.errors import InvalidArgument, InvalidData

ROWS_LOOKED_AT = 100
"""By which a file's format is recognised."""

Row = Mapping[str, Any]
"""A row's fields that aren't null."""


@dataclass(frozen=True, slots=True)
class DataFormat:
    """One way in which people write down training data."""

    name: str
    fields: str
    """What a row looks like, for people."""
    _is_sign_of: Callable[[Row], bool]
    _read: Callable[[Fields, Source], Example]
    _accepts: Callable[[Row], bool] | None = None
    """Where reading takes more than recognition: a file in Qwen's format may name one speaker otherwise."""

    def matches(self, value: Row) -> bool:
        """Whether a row's fields speak for this format."""
        return self._is_sign_of(present(value))

    def example(self, value: Row, source: Source) -> Example:
        """Read a row. Raises InvalidData, which names the file and line."""
        if not (self._accepts or self._is_sign_of)(present(value)):
            wrong = _wrong_field(present(value), self.fields)
            raise InvalidData(
                f"{source}: isn't in the format {self.name}: {wrong or f'found {_names(present(value))}'}; expected"
                f" {self.fields}"
            )
        fields = Fields(value)
        example = self._read(fields, source)
        check_characters((example.messages, example.tools, example.text), source)
        return replace(example, unread=fields.unread())


def recognise(path: str | Path, columns: Columns | None = None) -> DataFormat:
    """Find a file's format by its first rows. Raises InvalidData where there is none, or none that all of them have."""
    first: tuple[str, DataFormat] | None = None
    broken: str | None = None
    for row in islice(read_rows(path, columns), ROWS_LOOKED_AT):
        source = Source(str(path), row.line, row.number)
        if row.value is None:
            broken = broken or f"{source}: {row.error}"
            continue
        found = _format_of(row.value, source)
        where = f"line {row.line}" if row.number is None else f"row {row.number}"
        if first is None:
            first = where, found
        elif {first[1].name, found.name} == {"qwen", "sharegpt"}:
            first = first[0], _BY_NAME["sharegpt"]  # one is a part of the other
        elif first[1] is not found:
            raise InvalidData(
                f"{path}: {first[0]} is in the format {first[1].name}, {where} in {found.name}; "
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


def check_columns(columns: Columns | None, paths: Sequence[str]) -> None:
    """Raise InvalidArgument for a column that no file has, by the rows that formats are recognised by."""
    if columns is None:
        return
    found: dict[str, None] = {}
    for path in paths:
        for row in islice(read_rows(path), ROWS_LOOKED_AT):
            found |= dict.fromkeys(row.value or ())
    for name in columns.theirs:
        if name not in found:
            raise InvalidArgument(
                f"--columns: there is no column {name!r} in {', '.join(paths)}; there are {_names(found)}"
            )


def _format_of(value: Row, source: Source) -> DataFormat:
    for candidate in FORMATS:
        if candidate.matches(value):
            return candidate
    wrong = _wrong_field(present(value))
    if wrong is not None:
        raise InvalidData(f"{source}: {wrong}")
    accepted = "; ".join(f"{one.name} ({one.fields})" for one in FORMATS)
    names = list(present(value))
    hint = ""
    if len(names) > 1:
        hint = f"; or name the columns, as in --columns prompt={names[0]},completion={names[1]}"
    raise InvalidData(
        f"{source}: no known format has these fields: {_names(present(value))}; accepted are {accepted}{hint}"
    )


def _wrong_field(fields: Row, of: str = "") -> str | None:
    """Say which field has a format's name and not what belongs there; ``of``: of a format of these fields."""
    for name in ("conversations", "messages", "prompt", "completion", "text"):
        value = _listed(fields.get(name))
        if value is None or (of and name not in of):
            continue
        if isinstance(value, list) and not value:
            return f"{name} is an empty list"
        if name in ("conversations", "messages"):
            if not isinstance(value, list):
                return f"{name} holds {kind_of(value)}, and a list of turns belongs there"
        elif not (_is_text_or_messages(value) or isinstance(value, list)):
            return f"{name} holds {kind_of(value)}, and text belongs there"
    return None


def _names(fields: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, list(fields)[:8])) or "no fields"


def _listed(value: object) -> object:
    """Return a list that tables write as JSON text as the list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _first_fields(value: object) -> Sequence[str]:
    """Return the field names of a list's first object."""
    return tuple(value[0]) if isinstance(value, list) and value and isinstance(value[0], Mapping) else ()


def _speakers(fields: Row) -> set[object] | None:
    turns = _listed(fields.get("conversations"))
    if not isinstance(turns, list) or not turns:
        return None
    if not all(isinstance(turn, Mapping) and "from" in turn for turn in turns):
        return None
    return {turn["from"] if isinstance(turn["from"], str) else None for turn in turns}


def _is_qwen(fields: Row) -> bool:
    speakers = _speakers(fields)
    return speakers is not None and speakers <= {"system", "user", "assistant"}


def _is_sharegpt(fields: Row) -> bool:
    return "from" in _first_fields(_listed(fields.get("conversations")))


def _messages_field(fields: Row) -> str | None:
    for name in ("messages", "conversations"):
        value = fields.get(name)
        if (name == "messages" and isinstance(value, str)) or "role" in _first_fields(_listed(value)):
            return name
    return None


def _is_text_or_messages(value: object) -> bool:
    return is_textual(value) or "role" in _first_fields(value)


def _conversation(turns: Turns, fields: Fields, source: Source) -> Example:
    """Make an example of turns and of what every format may have beside them: a system text, and tools.

    A system turn of the conversation's own comes before the text beside it.
    """
    messages, trained = turns.messages, turns.trained
    system = fields.text("system", source)
    has_own = bool(messages) and messages[0]["role"] in ("system", "developer")
    if system and not has_own:
        messages, trained = ({"role": "system", "content": system}, *messages), (False, *trained)
    elif system and system != messages[0]["content"]:
        fields.not_read("system (there is a system turn)")
    for name in turns.unread:
        fields.not_read(name)
    tools = read_tools(fields.take("tools") or fields.take("functions"), source)
    return Example(messages, trained, tools, None, source)


def _read_sharegpt(fields: Fields, source: Source) -> Example:
    return _conversation(read_turns(fields.take("conversations"), "conversations", source), fields, source)


def _read_openai(fields: Fields, source: Source) -> Example:
    field = _messages_field(fields.row)
    assert field is not None
    return _conversation(read_messages(fields.take(field), field, source), fields, source)


def _read_alpaca(fields: Fields, source: Source) -> Example:
    texts = {name: fields.text(name, source) for name in ("instruction", "input", "output")}
    messages: list[Message] = []
    for pair in read_list(fields.take("history") or [], "history", source):
        said = [as_text(text) for text in pair] if isinstance(pair, list | tuple) else []
        if len(said) != 2 or None in said:
            raise InvalidData(f"{source}: history isn't a list of [question, answer]")
        messages += [{"role": "user", "content": said[0]}, {"role": "assistant", "content": said[1]}]
    question = "\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": texts["output"]}]
    trained = tuple(message["role"] == "assistant" for message in messages)
    return _conversation(Turns(tuple(messages), trained), fields, source)


def _read_completion(fields: Fields, source: Source) -> Example:
    """Texts become a user's and an assistant's message; of message lists, the completion alone is trained."""
    prompt, completion = fields.take("prompt"), fields.take("completion")
    asked = [{"role": "user", "content": prompt}] if is_textual(prompt) else prompt
    answered = [{"role": "assistant", "content": completion}] if is_textual(completion) else completion
    before = read_messages(asked, "prompt", source).untrained()
    return _conversation(before + read_messages(answered, "completion", source), fields, source)


def _read_text(fields: Fields, source: Source) -> Example:
    return Example((), (), (), fields.text("text", source), source)


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
    DataFormat("text", "text", lambda fields: is_textual(fields.get("text")), _read_text),
)
_BY_NAME: Mapping[str, DataFormat] = {one.name: one for one in FORMATS}
