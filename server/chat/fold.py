"""Reading an answer character by character: what a reader finds never depends on how the text was cut.

A reader is a generator that is sent one character after the other, and "" at the end. It tells a Sink what it finds.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TypeAlias, TypeVar

from manylora.server.chat.deltas import Arguments, CallBegins, Content, Delta, Reasoning
from manylora.server.chat.tools import Tool

T = TypeVar("T")
Reader: TypeAlias = Generator[None, str, T]
Emit: TypeAlias = Callable[[str], object]
SPACE = " \n\r\t"


class NotACall(Exception):
    """What looked like a call isn't one."""


class Ended(Exception):
    """The text ended where more was to come."""


class Sink:
    """Takes what a reader finds."""

    def __init__(self, tools: Mapping[str, Tool], mint: Callable[[], str]) -> None:
        """``tools`` by name; ``mint`` makes a call's id."""
        self.tools = tools
        self._mint = mint
        self._found: list[Delta] = []
        self.calls = 0
        self.thinking = False

    def content(self, text: str) -> None:
        """Take more of the answer."""
        if text:
            self._found.append(Content(text))

    def reasoning(self, text: str) -> None:
        """Take more of what is thought."""
        self._found.append(Reasoning(text))

    def begin(self, name: str) -> Tool | None:
        """A call begins; return its tool, None if the request has none of that name."""
        tool = self.tools.get(name)
        custom = tool is not None and tool.custom
        self._found.append(CallBegins(self.calls, self._mint(), name, custom))
        self.calls += 1
        return tool

    def arguments(self, text: str) -> None:
        """Take more of the last call's arguments."""
        if text:
            self._found.append(Arguments(self.calls - 1, text))

    def take(self) -> list[Delta]:
        """Return what was found since the last time, pieces that belong together joined."""
        found, self._found = self._found, []
        joined: list[Delta] = []
        texts: list[str] = []
        for delta in found:
            last = joined[-1] if joined else None
            if isinstance(delta, CallBegins) or last is None or not _goes_on(last, delta):
                _close(joined, texts)
                joined.append(delta)
                texts = [] if isinstance(delta, CallBegins) else [delta.text]
            else:
                texts.append(delta.text)
        _close(joined, texts)
        return joined


def _goes_on(last: Delta, delta: Delta) -> bool:
    if isinstance(last, Arguments) and isinstance(delta, Arguments):
        return last.number == delta.number
    return type(last) is type(delta)


def _close(joined: list[Delta], texts: Sequence[str]) -> None:
    if len(texts) > 1:
        last = joined[-1]
        assert not isinstance(last, CallBegins)
        joined[-1] = last._replace(text="".join(texts))


class Fold:
    """Reads one answer. Is a ChoiceParser."""

    def __init__(self, sink: Sink, reader: Reader[None], *, may_think: bool = False) -> None:
        self._sink = sink
        self.may_think = may_think
        self._reader = reader
        next(reader)

    @property
    def thinking(self) -> bool:
        """Whether what comes next is thought, not said."""
        return self._sink.thinking

    def push(self, text: str) -> Sequence[Delta]:
        """See ChoiceParser."""
        send = self._reader.send
        for character in text:
            send(character)
        return self._sink.take()

    def end(self) -> Sequence[Delta]:
        """See ChoiceParser."""
        try:
            self._reader.send("")
        except StopIteration:
            return self._sink.take()
        raise AssertionError("a reader ends with its text")


def plain(sink: Sink) -> Reader[None]:
    """Read an answer that is content and nothing else."""
    while character := (yield):
        sink.content(character)


def until(sink: Sink, marks: Sequence[str], first: str = "") -> Reader[str]:
    """Let content out up to one of ``marks`` and return it; "" at the end. White space before a mark is dropped.

    So is what an answer leaves of a mark right behind a call: it was cut inside of it. ``first`` was read already.
    """
    said = False

    def emit(text: str) -> None:
        nonlocal said
        said = True
        sink.content(text)

    return (yield from up_to(emit, marks, first, at_end=lambda space: not sink.calls or (said and not space)))


def up_to(
    emit: Emit, marks: Sequence[str], first: str = "", at_end: Callable[[bool], bool] = lambda space: True
) -> Reader[str]:
    """Emit what stands before one of ``marks``, without the white space next to it; return the mark, "" at the end.

    ``at_end`` says whether what is held at the end is let out, given whether it is nothing but white space.
    """
    space, held, character = "", "", first
    while True:
        if character:
            if held or character not in SPACE:
                held += character
            else:
                space += character
            while held and not any(mark.startswith(held) for mark in marks):
                emit(space + held[0])
                space, held = "", held[1:]
                while held and held[0] in SPACE:
                    space, held = space + held[0], held[1:]
            if held in marks:
                return held
        character = yield
        if not character:
            if at_end(not held):
                emit(space + held)
            return ""


def one(raw: list[str]) -> Reader[str]:
    """Return the next character, kept in ``raw``. Raises Ended."""
    character = yield
    if not character:
        raise Ended
    raw.append(character)
    return character


def solid(raw: list[str]) -> Reader[str]:
    """Return the next character that isn't white space. Raises Ended."""
    while (character := (yield from one(raw))) in SPACE:
        pass
    return character


def give_back(sink: Sink, raw: Sequence[str], calls: int) -> None:
    """Let out as content what turned out to be no call; where one had begun, what was told stays."""
    if sink.calls == calls:
        sink.content("".join(raw))
