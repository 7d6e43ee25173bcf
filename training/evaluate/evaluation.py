"""Scores generations of a held-out set through the served base, before and after training."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from manylora.training.errors import InvalidArgument
from manylora.training.evaluate.generate import Generate, Message
from manylora.training.evaluate.metrics import KINDS, METRIC_NAMES, MetricKind, compiled, judge, share_right

SAMPLES = 8
"""Prompts that a report shows."""


class HeldOut(Protocol):
    """What the evaluation reads of an example. manylora.training.data.example.Example has it."""

    @property
    def messages(self) -> Sequence[Message]:
        """The messages, in OpenAI's shape."""

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """The tools that the conversation may call."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One held-out prompt with the reference and what came out. ``after`` is empty before any training."""

    prompt: str
    expected: str
    before: str
    after: str = ""
    before_right: bool | None = None
    after_right: bool | None = None
    """How the answers were judged; None: not at all."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What a held-out set's generations are worth."""

    metrics: Mapping[str, float]
    """Of the adapter that was asked about, or of the base: `eval_exact_match` and its like, shares from 0 to 1."""
    before: Mapping[str, float]
    """The same of the base alone."""
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """How to generate and judge."""

    kind: MetricKind = "exact"
    pattern: str | None = None
    """For kind `regex`: what to look for in every answer; None: each reference is its own pattern."""
    max_new_tokens: int = 256
    limit: int = 200
    """Of the held-out set's examples at most so many, the first ones."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidArgument(f"there is no metric {self.kind!r}: use one of {', '.join(KINDS)}")
        judge(self.kind, self.pattern)
        if self.max_new_tokens < 1 or self.limit < 1:
            raise InvalidArgument("the evaluation needs at least one new token and one example")

    @property
    def metric(self) -> str:
        """The name to give as metric_for_best_model; greater is better."""
        return f"eval_{METRIC_NAMES[self.kind]}"


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation up to an assistant's turn, and that turn."""

    conversation: tuple[Message, ...]
    reference: str


@dataclass(slots=True)
class GenerationEvaluation:
    """A held-out set and who answers it. The base's own answers are generated once and kept.

    Examples with tools are left out: their prompt has the tools in it, which the server doesn't render.
    Raises InvalidArgument if no example is left, or a reference that should be a regular expression is none.
    """

    settings: EvaluationSettings
    examples: Sequence[HeldOut]
    generate: Generate
    _questions: tuple[Question, ...] = field(init=False, repr=False)
    _before: tuple[str, ...] | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        found = (None if example.tools else question_of(example.messages) for example in self.examples)
        self._questions = tuple(question for question in found if question is not None)[: self.settings.limit]
        if not self._questions:
            raise InvalidArgument(
                "no held-out example without tools has an assistant's text that answers something: there is nothing"
                " to generate"
            )
        if self.settings.kind == "regex" and self.settings.pattern is None:
            for question in self._questions:
                compiled(question.reference)

    @property
    def questions(self) -> tuple[Question, ...]:
        """The prompts with their references."""
        return self._questions

    def score(self, adapter: Path | None) -> Scores:
        """Generate with the adapter in that directory, or with the base alone, and judge. Raises TrainingError."""
        before = self._base_answers()
        after = before if adapter is None else self._answers(adapter)
        metrics = self._metrics(after)
        samples = []
        judged = judge(self.settings.kind, self.settings.pattern)
        for question, base, answer in list(zip(self._questions, before, after, strict=True))[:SAMPLES]:
            sample = Sample(
                prompt=shown(question.conversation),
                expected=question.reference,
                before=base,
                before_right=judged(base, question.reference),
            )
            if adapter is not None:
                right = judged(answer, question.reference)
                sample = dataclasses.replace(sample, after=answer, after_right=right)
            samples.append(sample)
        return Scores(metrics, self._metrics(before), tuple(samples))

    def _base_answers(self) -> tuple[str, ...]:
        if self._before is None:
            self._before = self._answers(None)
        return self._before

    def _answers(self, adapter: Path | None) -> tuple[str, ...]:
        conversations = [question.conversation for question in self._questions]
        return tuple(self.generate(conversations, adapter, self.settings.max_new_tokens))

    def _metrics(self, answers: Sequence[str]) -> dict[str, float]:
        judged = judge(self.settings.kind, self.settings.pattern)
        references = [question.reference for question in self._questions]
        return {self.settings.metric: share_right(judged, answers, references)}


def question_of(messages: Sequence[Message]) -> Question | None:
    """Return the conversation up to its last assistant turn, and that turn's text; None where there is no such turn.

    A turn that only calls tools has no text to compare and doesn't count.
    """
    for index in range(len(messages) - 1, 0, -1):
        text = _text(messages[index].get("content"))
        if messages[index].get("role") == "assistant" and text:
            return Question(tuple(messages[:index]), text)
    return None


def shown(conversation: Sequence[Message]) -> str:
    """Return a conversation as a report shows it: the user's text alone if that is all there is."""
    if len(conversation) == 1:
        return _text(conversation[0].get("content"))
    return "\n".join(f"{message.get('role')}: {_said(message)}" for message in conversation)


def _said(message: Message) -> str:
    text = _text(message.get("content"))
    return text or json.dumps(message.get("tool_calls") or "", ensure_ascii=False)


def _text(content: Any) -> str:
    """Return a message's text; OpenAI's list of parts is joined."""
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple):
        return "".join(part.get("text", "") for part in content if isinstance(part, Mapping))
    return ""
