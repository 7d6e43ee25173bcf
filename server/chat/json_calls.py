"""Reading JSON as it comes: values that are passed on as they stand, and objects that call a tool."""

import json
from collections.abc import Collection
from typing import NamedTuple

from manylora.server.chat.fold import SPACE, Emit, Ended, NotACall, Reader, Sink, one, solid
from manylora.server.chat.tools import INPUT, Tool


class RawEnd(NamedTuple):
    """What stands behind an input that is told raw."""

    text: str
    is_last: bool
    """Whether it counts at the end of the answer alone; else where it comes first."""


ARGUMENTS = ("arguments", "parameters")
"""What families call them."""
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}
_BROKEN = "\ufffd"


def drop(text: str) -> None:
    """Take a text that nobody wants."""


def string(raw: list[str], emit: Emit) -> Reader[None]:
    """Read the rest of a JSON string, decoded."""
    high = ""
    """The first half of a character beyond 16 bits."""
    while True:
        character, escaped = yield from _unit(raw)
        if high:
            if escaped and "\udc00" <= character <= "\udfff":
                emit((high + character).encode("utf-16", "surrogatepass").decode("utf-16"))
                high = ""
                continue
            emit(_BROKEN)
            high = ""
        if character == '"' and not escaped:
            return
        if escaped and "\ud800" <= character <= "\udbff":
            high = character
        else:
            emit(_BROKEN if "\udc00" <= character <= "\udfff" else character)


def _unit(raw: list[str]) -> Reader[tuple[str, bool]]:
    """Read a character, or an escape and what it stands for; say whether it was one."""
    character = yield from one(raw)
    if character != "\\":
        return character, False
    character = yield from one(raw)
    if character != "u":
        return _ESCAPED.get(character, character), True
    digits = ""
    for _ in range(4):
        digits += yield from one(raw)
    try:
        return chr(int(digits, 16)), True
    except ValueError:
        return _BROKEN, True


def text(raw: list[str]) -> Reader[str]:
    """Return the rest of a JSON string, decoded."""
    parts: list[str] = []
    yield from string(raw, parts.append)
    return "".join(parts)


def value(raw: list[str], emit: Emit, character: str) -> Reader[str]:
    """Emit a JSON value that begins with ``character``, as it stands; return what was read behind it, if anything."""
    if character not in '{["':
        while character not in f",}}]{SPACE}":
            emit(character)
            character = yield from one(raw)
        return character
    depth, quoted = 0, False
    while True:
        emit(character)
        if quoted:
            if character == "\\":
                emit((yield from one(raw)))
            elif character == '"':
                quoted = False
        elif character == '"':
            quoted = True
        elif character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
        if not quoted and depth == 0:
            return ""
        character = yield from one(raw)


def call(
    sink: Sink, raw: list[str], raw_end: RawEnd, *, known: Collection[str] | None = None
) -> Reader[None]:
    """Read the rest of an object that calls a tool, after its opening brace.

    ``known`` are the names that make it a call; None: any. ``raw_end`` is what stands behind an input that is told raw.
    Raises NotACall, and Ended.
    """
    reading = _Call(sink, known, raw_end)
    left = ""
    while True:
        character = left if left.strip() else (yield from solid(raw))
        left = ""
        if character == "}":
            break
        if character == ",":
            continue
        if character != '"':
            raise NotACall
        key = yield from text(raw)
        if (yield from solid(raw)) != ":":
            raise NotACall
        left = yield from reading.member(raw, key, (yield from solid(raw)))
        if reading.over:
            return
    reading.finish()


def named(sink: Sink, raw: list[str], name: str, raw_end: RawEnd) -> Reader[None]:
    """Begin a call whose name stands outside its JSON, and read its arguments, after their opening brace."""
    reading = _Call(sink, None, raw_end)
    reading.begin(name)
    yield from reading.member(raw, ARGUMENTS[0], "{")


class _Call:
    """A call while its object is read: its arguments may come before its name."""

    def __init__(self, sink: Sink, known: Collection[str] | None, raw_end: RawEnd) -> None:
        self._sink = sink
        self._known = known
        self._raw_end = raw_end
        self._tool: Tool | None = None
        self._named = self._argued = False
        self._early: list[str] = []
        self.over = False
        """Whether the object has been read to its end by what its input ends with."""

    def member(self, raw: list[str], key: str, character: str) -> Reader[str]:
        """Read a member's value, which begins with ``character``; return what was read behind it, if anything."""
        if key == "name" and character == '"' and not self._named:
            self.begin((yield from text(raw)))
            return ""
        if key not in ARGUMENTS or self._argued:
            return (yield from value(raw, drop, character))
        self._argued = True
        if not self._named:
            return (yield from value(raw, self._early.append, character))
        if self._tool is not None and self._tool.custom:
            return (yield from self._input(raw, character))
        if character == '"':  # JSON inside a string
            yield from string(raw, self._sink.arguments)
            return ""
        if character in "{[":
            return (yield from value(raw, self._sink.arguments, character))
        word: list[str] = []
        left = yield from value(raw, word.append, character)
        self._sink.arguments(_of_word("".join(word)))
        return left

    def finish(self) -> None:
        """End: an object that named no tool isn't a call, one without arguments has none."""
        if not self._named:
            raise NotACall
        if not self._argued and not (self._tool is not None and self._tool.custom):
            self._sink.arguments("{}")

    def begin(self, name: str) -> None:
        """Take the tool's name; arguments that came before it are told now."""
        if not name or (self._known is not None and name not in self._known):
            raise NotACall
        self._tool = self._sink.begin(name)
        self._named = True
        if not self._argued:
            return
        early = "".join(self._early)
        if self._tool is not None and self._tool.custom:
            self._sink.arguments(_input_of(early))
        else:
            self._sink.arguments(early if early[:1] in ("{", "[") else _of_word(early))

    def _input(self, raw: list[str], character: str) -> Reader[str]:
        """Read a custom tool's arguments, whose one member is its input."""
        emit = self._sink.arguments
        if character == '"':
            yield from string(raw, emit)
            return ""
        if character != "{":
            return (yield from value(raw, drop, character))
        told, left = False, ""
        while True:
            character = left if left.strip() else (yield from solid(raw))
            left = ""
            if character == "}":
                return ""
            if character != '"':
                if character == ",":
                    continue
                raise NotACall
            key = yield from text(raw)
            if (yield from solid(raw)) != ":":
                raise NotACall
            character = yield from solid(raw)
            if told or key != INPUT or character != '"':
                left = yield from value(raw, drop, character)
                continue
            told = True
            if self._tool is not None and self._tool.raw:
                yield from _raw(raw, emit, self._raw_end)
                self.over = True
                return ""
            yield from string(raw, emit)


def _raw(raw: list[str], emit: Emit, end: RawEnd) -> Reader[None]:
    """Emit what stands before ``end``, or before the beginning of it that a cut answer has."""
    held = ""
    while True:
        character = yield
        if not character:
            begun = next(size for size in range(len(end.text), -1, -1) if held.endswith(end.text[:size]))
            emit(held[: len(held) - begun])
            raise Ended
        raw.append(character)
        held += character
        if end.is_last:
            emit(held[: -len(end.text)])
            held = held[-len(end.text) :]
            continue
        while held and not end.text.startswith(held):
            emit(held[0])
            held = held[1:]
        if held == end.text:
            return


def _of_word(word: str) -> str:
    """Return the arguments that a value means which is no object: JSON inside a string, or none."""
    try:
        found = json.loads(word)
    except ValueError:
        return word
    if found is None:
        return "{}"
    return found if isinstance(found, str) else word


def _input_of(arguments: str) -> str:
    """Return a custom tool's input, of its arguments as JSON."""
    try:
        found = json.loads(arguments)
    except ValueError:
        return ""
    told = found.get(INPUT) if isinstance(found, dict) else found
    return told if isinstance(told, str) else ""
