"""The road back: what the engine gave becomes a route's answer, whole or as events. One way for every route.

A route brings a Form, which says what its answers look like. Choices, their parsers and the counts of tokens are the
same for all.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from manylora.server.api.choices import Choice, Step
from manylora.server.api.generation import Generation, Usage, usage_of
from manylora.server.api.rendering import dumps
from manylora.server.engine.request import SequenceOutput

DONE = "data: [DONE]\n\n"


class Form(Protocol):
    """What a route's answer looks like; made for each answer."""

    @property
    def large(self) -> bool:
        """Whether the answer as one object may be long enough to be written in a thread."""
        ...

    def whole(self, choices: Iterable[Choice], usage: Usage, *, at_once: bool) -> dict[str, object]:
        """Return the answer as one object; its choices are made ``at_once``, or as they are written."""
        ...

    async def events(self, step: Step) -> str:
        """Return the events that tell what came of a choice; "" where that is nothing."""
        ...

    def last(self, usage: Usage) -> str:
        """Return the events that end the stream."""
        ...

    def failed(self, envelope: Mapping[str, object]) -> str:
        """Return the event that tells why the stream ends here; ``envelope`` is OpenAI's error object."""
        ...


class Writer:
    """Writes one answer as events."""

    def __init__(self, generation: Generation, form: Form) -> None:
        self.generation = generation
        self._form = form
        self._choices = generation.choices()

    async def of(self, outputs: Sequence[tuple[int, SequenceOutput]]) -> bytes:
        """Return the events of what came, of none where nothing is to be told."""
        choices, form = self._choices, self._form
        return "".join(
            [await form.events(choices[index].read(index, output)) for index, output in outputs]
        ).encode()

    def last(self) -> bytes:
        """Return what ends the stream."""
        return self._form.last(usage_of(self._choices, self.generation.ask.n)).encode()

    def failed(self, envelope: Mapping[str, object]) -> bytes:
        """Return the event that tells of an error."""
        return self._form.failed(envelope).encode()

    def note(self) -> None:
        """Have the log line say what was made, however it ended."""
        self.generation.note_tokens()


def event(data: object) -> str:
    """Return the event that carries a value as JSON."""
    return f"data: {dumps(data)}\n\n"
