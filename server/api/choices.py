"""One answer as it grows: what the engine gave, read by a parser of its own where there is more in it than text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from manylora.server.chat.deltas import Arguments, CallBegins, ChoiceParser, Content, Delta, Reasoning
from manylora.server.engine.request import FinishReason, SequenceOutput, TokenLogprobs

CALLED = "tool_calls"
"""How OpenAI names the end of an answer that calls tools of its own accord."""


class Brought(NamedTuple):
    """A token with its log probability, and what was certain with it."""

    token: TokenLogprobs | None
    """None: the deltas came with the end."""
    deltas: Sequence[Delta]
    thought: bool = False
    """Whether it is of what is thought: it may have no delta, and what it says next may be no thought."""


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
    brought: Sequence[Brought] = ()
    """The deltas by the tokens that brought them, where that is asked for."""


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
    by_token: bool = False
    """Whether it is told which token brought what: log probabilities go beside what they are of."""
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    deltas: list[Delta] = field(default_factory=list)
    """What it says in its order, for those who tell it in that."""
    brought: list[Brought] = field(default_factory=list)
    """The same by tokens, where that is asked for."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None
    stop_reason: str | int | None = None
    last: SequenceOutput | None = None
    thought: int | None = None
    """Tokens of what was thought; None: the model doesn't think."""
    _called: bool = False

    @property
    def spoken_logprobs(self) -> list[TokenLogprobs]:
        """``logprobs`` without that of a token that ended it as an id."""
        silent = self.last is not None and self.last.silent_end
        return self.logprobs[:-1] if silent else self.logprobs

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
        brought: Sequence[Brought] = ()
        thinking = parser is not None and parser.thinking
        if self.by_token:
            brought = [self._brought(token, text) for token, text in _by_token(output)]
            deltas = [delta for each in brought for delta in each.deltas]
        else:
            deltas = self._read(output.text)
        if parser is not None:
            self._count_thought(output, thinking or parser.thinking)
            if output.finish_reason is not None:
                rest = parser.end()
                deltas, brought = [*deltas, *rest], [*brought, Brought(None, rest)]
            self._called = self._called or any(isinstance(delta, CallBegins) for delta in deltas)
        finish = None if output.finish_reason is None else self.finish
        return Step(index, deltas, output, finish, first, brought if self.by_token else ())

    def _brought(self, token: TokenLogprobs | None, text: str) -> Brought:
        before = self.parser is not None and self.parser.thinking
        deltas = self._read(text)
        return Brought(token, deltas, before or (self.parser is not None and self.parser.thinking))

    def _read(self, text: str) -> Sequence[Delta]:
        """Return what is certain with more of the text."""
        if not text:
            return ()
        return (Content(text),) if self.parser is None else self.parser.push(text)

    def _count_thought(self, output: SequenceOutput, thinking: bool) -> None:
        if thinking or (self.thought is None and self.parser is not None and self.parser.may_think):
            self.thought = (self.thought or 0) + (len(output.token_ids) if thinking else 0)

    def add(self, output: SequenceOutput) -> None:
        """Take in what came, and keep all of it."""
        step = self.read(0, output)
        self.brought += step.brought
        for delta in step.deltas:
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


def _by_token(output: SequenceOutput) -> Iterator[tuple[TokenLogprobs | None, str]]:
    """Yield the tokens that were told of with the text that each brought; what is left over comes with none."""
    text = output.text
    lengths = output.lengths or (len(text),)
    for token, length in zip(output.spoken_logprobs, lengths, strict=False):
        yield token, text[:length]
        text = text[length:]
    yield None, text
