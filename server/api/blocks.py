"""Answers that are told in parts, each with a beginning and an end: which part each piece of an answer belongs to."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from manylora.server.chat.deltas import CallBegins, Content, Delta, Reasoning
from manylora.server.engine.request import TokenLogprobs

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
    tokens: list[TokenLogprobs] = field(default_factory=list)
    """Of a text, where tokens are told of: its own."""

    @property
    def text(self) -> str:
        """What it says: of a call, its arguments."""
        return "".join(self.pieces)


class Happening(NamedTuple):
    """What happens to a part."""

    what: Literal["begins", "goes on", "ends"]
    part: Part
    text: str = ""
    """What it goes on with."""
    tokens: Sequence[TokenLogprobs] = ()
    """And of which tokens that is."""


class Parts:
    """Takes an answer piece by piece. The parts are the same however it was cut.

    Tokens that are told of are the text's that comes next, or that is open at the end: what spelled a thought is of
    no text, nor what spelled a call and closed it.
    """

    def __init__(self, *, thoughts: bool) -> None:
        """``thoughts``: whether they are parts of it; otherwise they are left out."""
        self.done: list[Part] = []
        """Parts, the last of which may go on."""
        self._thoughts = thoughts
        self._open = False
        self._waiting: list[TokenLogprobs] = []

    def push(
        self, deltas: Iterable[Delta], token: TokenLogprobs | None = None, *, thought: bool = False
    ) -> Iterator[Happening]:
        """Take more, which ``token`` brought, the end of a thought perhaps; yield what happens with it."""
        if token is not None:
            self._waiting.append(token)
        for delta in deltas:
            tokens, self._waiting = self._waiting, []
            if isinstance(delta, CallBegins):
                yield from self._begin("call", delta)
                continue
            if isinstance(delta, Reasoning) and not self._thoughts:
                continue
            kind: Kind = "call"
            if isinstance(delta, Content | Reasoning):
                kind = "text" if isinstance(delta, Content) else "thought"
            if not self._open or self.done[-1].kind != kind:
                if self._open and self.done[-1].kind == "call":
                    tokens = tokens[-1:] if token is not None else []  # those before closed the call
                yield from self._begin(kind)
            if delta.text:
                yield self._goes_on(delta.text, tokens)
        if thought:
            self._waiting.clear()

    def end(self) -> Iterator[Happening]:
        """End the answer; one that says nothing is an empty text."""
        if not self.done:
            yield from self._begin("text")
        if self._open and self._waiting and self.done[-1].kind == "text":
            yield self._goes_on("", self._waiting)
        yield from self._close()

    def _goes_on(self, text: str, tokens: Sequence[TokenLogprobs]) -> Happening:
        part = self.done[-1]
        part.pieces.append(text)
        part.tokens += tokens
        return Happening("goes on", part, text, tokens)

    def _begin(self, kind: Kind, call: CallBegins | None = None) -> Iterator[Happening]:
        yield from self._close()
        part = Part(len(self.done), kind, call)
        self.done.append(part)
        self._open = True
        yield Happening("begins", part)

    def _close(self) -> Iterator[Happening]:
        if self._open:
            self._open = False
            yield Happening("ends", self.done[-1])
