"""One answer as it grows: what the engine gave, read by a parser of its own where there is more in it than text."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from manylora.server.chat.deltas import Arguments, CallBegins, ChoiceParser, Content, Delta, Reasoning
from manylora.server.engine.request import FinishReason, SequenceOutput, TokenLogprobs

CALLED = "tool_calls"
"""How OpenAI names the end of an answer that calls tools of its own accord."""


class Step(NamedTuple):
    """What came of one choice at once."""

    choice: int
    """Its index."""
    deltas: Sequence[Delta]
    output: SequenceOutput
    finish: str | None
    """As OpenAI names it; None: it goes on."""
    first: bool
    """Whether nothing of this choice came before."""


@dataclass(slots=True)
class Call:
    """A call of a tool, as far as it has come."""

    call_id: str
    name: str
    custom: bool
    arguments: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Choice:
    """One answer as it grows."""

    parser: ChoiceParser | None = None
    """None: all of its text is content."""
    after_calls: str = CALLED
    """The finish reason of an answer that called tools and then came to its end."""
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    deltas: list[Delta] = field(default_factory=list)
    """What it says in its order, for those who tell it in that."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    stop_reason: str | int | None = None
    last: SequenceOutput | None = None
    thought: int | None = None
    """Tokens of what was thought; None: the model doesn't think."""
    _called: bool = False

    @property
    def finish(self) -> str | None:
        """Why it ended, as OpenAI names it; None: it hasn't."""
        reason = None if self.last is None else self.last.finish_reason
        if reason is None:
            return None
        return self.after_calls if self._called and reason is FinishReason.STOP else reason.value

    def read(self, index: int, output: SequenceOutput) -> Step:
        """Take in what came, and keep of it the counts alone: a stream has told the rest."""
        first = self.last is None
        self.last = output
        parser = self.parser
        deltas: Sequence[Delta]
        if parser is None:
            deltas = (Content(output.text),) if output.text else ()
        else:
            thinking = parser.thinking
            deltas = parser.push(output.text) if output.text else ()
            self._count_thought(output, thinking or parser.thinking)
            if output.finish_reason is not None:
                deltas = [*deltas, *parser.end()]
            self._called = self._called or any(isinstance(delta, CallBegins) for delta in deltas)
        return Step(index, deltas, output, None if output.finish_reason is None else self.finish, first)

    def _count_thought(self, output: SequenceOutput, thinking: bool) -> None:
        if thinking or (self.thought is None and self.parser is not None and self.parser.may_think):
            self.thought = (self.thought or 0) + (len(output.token_ids) if thinking else 0)

    def add(self, output: SequenceOutput) -> None:
        """Take in what came, and keep all of it."""
        for delta in self.read(0, output).deltas:
            self.deltas.append(delta)
            if isinstance(delta, Content):
                self.text.append(delta.text)
            elif isinstance(delta, Reasoning):
                self.reasoning.append(delta.text)
            elif isinstance(delta, CallBegins):
                self.calls.append(Call(delta.call_id, delta.name, delta.custom))
            elif isinstance(delta, Arguments):
                self.calls[delta.number].arguments.append(delta.text)
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        self.stop_reason = output.stop_reason
