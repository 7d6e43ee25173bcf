"""What the text of an answer says, piece by piece: content, reasoning, calls of tools."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias


class Content(NamedTuple):
    """More of the answer itself."""

    text: str


class Reasoning(NamedTuple):
    """More of what the model thought before it answered."""

    text: str


class CallBegins(NamedTuple):
    """A tool is called: its name is known, its arguments follow."""

    number: int
    """Which of the answer's calls, from 0 without gaps."""
    call_id: str
    name: str
    custom: bool = False
    """Whether what follows is a custom tool's free text, not JSON."""


class Arguments(NamedTuple):
    """More of a call's arguments: JSON text, or a custom tool's input."""

    number: int
    text: str


Delta: TypeAlias = Content | Reasoning | CallBegins | Arguments


class ChoiceParser(Protocol):
    """Reads one answer as it comes. What it returns in all depends on the text, not on how that was cut."""

    @property
    def thinking(self) -> bool:
        """Whether what comes next is thought, not said."""
        ...

    @property
    def may_think(self) -> bool:
        """Whether thoughts may come at all."""
        ...

    def push(self, text: str) -> Sequence[Delta]:
        """Take more of the text; return what is certain with it."""
        ...

    def end(self) -> Sequence[Delta]:
        """Return what was held back; nothing follows."""
        ...
