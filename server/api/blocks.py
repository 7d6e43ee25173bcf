"""Answers that are told in parts, each with a beginning and an end: which part each piece of an answer belongs to."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from manylora.server.chat.deltas import CallBegins, Content, Delta, Reasoning

Kind: TypeAlias = Literal["text", "thought", "call"]


@dataclass(slots=True)
class Part:
    """A text, a thought or a call, as far as it has come."""

    index: int
    """Which of the answer's parts."""
    kind: Kind
    call: CallBegins | None = None
    """Of a call: what it began with."""
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """What it says: of a call, its arguments."""
        return "".join(self.pieces)


Happening: TypeAlias = tuple[Literal["begins", "goes on", "ends"], Part, str]
"""What happens to a part; the text is what it goes on with."""


class Parts:
    """Takes an answer piece by piece. The parts are the same however it was cut."""

    def __init__(self, *, thoughts: bool) -> None:
        """``thoughts``: whether they are parts of it; otherwise they are left out."""
        self.done: list[Part] = []
        """Parts, the last of which may go on."""
        self._thoughts = thoughts
        self._open = False

    def push(self, deltas: Iterable[Delta]) -> Iterator[Happening]:
        """Take more; yield what happens with it."""
        for delta in deltas:
            if isinstance(delta, CallBegins):
                yield from self._begin("call", delta)
                continue
            if isinstance(delta, Reasoning) and not self._thoughts:
                continue
            kind: Kind = "call"
            if isinstance(delta, Content | Reasoning):
                kind = "text" if isinstance(delta, Content) else "thought"
            if not self._open or self.done[-1].kind != kind:
                yield from self._begin(kind)
            if delta.text:
                self.done[-1].pieces.append(delta.text)
                yield "goes on", self.done[-1], delta.text

    def end(self) -> Iterator[Happening]:
        """End the answer; one that says nothing is an empty text."""
        if not self.done:
            yield from self._begin("text")
        yield from self._close()

    def _begin(self, kind: Kind, call: CallBegins | None = None) -> Iterator[Happening]:
        yield from self._close()
        part = Part(len(self.done), kind, call)
        self.done.append(part)
        self._open = True
        yield "begins", part, ""

    def _close(self) -> Iterator[Happening]:
        if self._open:
            self._open = False
            yield "ends", self.done[-1], ""
