"""Scores of generations, before and after training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, Trainer

from manylora.training.data.example import Example, Source
from manylora.training.errors import InvalidArgument
from manylora.training.evaluate.evaluation import (
    SAMPLES,
    EvaluationSettings,
    GenerationEvaluation,
    question_of,
    shown,
)
from tests.training.report.tiny_run import tiny_trainer

Message = Mapping[str, Any]


def example(*turns: str, tools: tuple[Mapping[str, Any], ...] = ()) -> Example:
    """A conversation of turns like `user: hello`."""
    messages = tuple({"role": turn.split(": ")[0], "content": turn.split(": ", 1)[1]} for turn in turns)
    trained = tuple(message["role"] == "assistant" for message in messages)
    return Example(messages, trained, tools, None, Source("x.json", 1))


def sums(count: int) -> list[Example]:
    return [example(f"user: {n} + {n}", f"assistant: {2 * n}") for n in range(count)]


class Pupil:
    """Knows the sums below a number that its adapter's name tells; without one it knows none."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, Path | None, int]] = []

    def __call__(
        self, conversations: Sequence[Sequence[Message]], adapter: Path | None, max_new_tokens: int
    ) -> list[str]:
        self.calls.append((len(conversations), adapter, max_new_tokens))
        knows = int(adapter.name) if adapter else 0
        asked = [int(conversation[-1]["content"].split()[0]) for conversation in conversations]
        return [str(2 * n) if n < knows else "?" for n in asked]


def test_an_adapter_is_scored_beside_the_base() -> None:
    pupil = Pupil()
    evaluation = GenerationEvaluation(EvaluationSettings(max_new_tokens=7), sums(20), pupil)
    scores = evaluation.score(Path("adapters/15"))
    assert scores.metrics == {"eval_exact_match": 0.75}
    assert scores.before == {"eval_exact_match": 0.0}
    assert len(scores.samples) == SAMPLES
    first = scores.samples[0]
    assert (first.prompt, first.expected, first.before, first.after) == ("0 + 0", "0", "?", "0")
    assert (first.before_right, first.after_right) == (False, True)
    assert pupil.calls == [(20, None, 7), (20, Path("adapters/15"), 7)]


def test_the_base_is_asked_once() -> None:
    pupil = Pupil()
    evaluation = GenerationEvaluation(EvaluationSettings(limit=4), sums(20), pupil)
    before = evaluation.score(None)
    assert before.metrics == before.before == {"eval_exact_match": 0.0}
    assert before.samples[0].after == ""
    evaluation.score(Path("2"))
    assert evaluation.score(Path("4")).metrics == {"eval_exact_match": 1.0}
    assert [adapter for _, adapter, _ in pupil.calls] == [None, Path("2"), Path("4")]
    assert pupil.calls[0][0] == 4


def test_the_prompt_is_all_before_the_last_answer() -> None:
    messages = example("system: be brief", "user: a", "assistant: b", "user: c", "assistant: d").messages
    question = question_of(messages)
    assert question is not None
    assert (question.conversation, question.reference) == (messages[:4], "d")
    assert shown(question.conversation) == "system: be brief\nuser: a\nassistant: b\nuser: c"
    # What follows the last answer has none to compare with.
    followed = question_of((*messages, {"role": "user", "content": "e"}))
    assert followed == question


def test_what_cannot_be_compared_is_left_out() -> None:
    calls = [{"function": {"name": "f", "arguments": {}}}]
    assert question_of([{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": calls}]) is None
    assert question_of([{"role": "assistant", "content": "unasked"}]) is None
    examples = [
        example("user: 1 + 1", "assistant: 2", tools=({"type": "function"},)),
        Example((), (), (), "plain text", Source("x.txt", 1)),
        *sums(2),
    ]
    assert len(GenerationEvaluation(EvaluationSettings(), examples, Pupil()).questions) == 2
    with pytest.raises(InvalidArgument, match="nothing to generate"):
        GenerationEvaluation(EvaluationSettings(), examples[:2], Pupil())


def test_bad_settings_are_refused_before_anything_runs() -> None:
    with pytest.raises(InvalidArgument, match="not a regular expression"):
        EvaluationSettings("regex", "(")
    with pytest.raises(InvalidArgument, match="no metric"):
        EvaluationSettings("bleu")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="at least one"):
        EvaluationSettings(limit=0)
    with pytest.raises(InvalidArgument, match="not a regular expression"):
        GenerationEvaluation(EvaluationSettings("regex"), [example("user: x", "assistant: (")], Pupil())


def test_early_stopping_and_the_best_checkpoint_follow_the_score(tmp_path: Path) -> None:
    evaluation = GenerationEvaluation(EvaluationSettings(), sums(10), Pupil())
    known = iter((3, 8, 8, 7, 9))

    class ScoredTrainer(Trainer):
        def evaluation_loop(self, *args: Any, **named: Any) -> Any:
            output = super().evaluation_loop(*args, **named)
            output.metrics.update(evaluation.score(Path(str(next(known)))).metrics)
            return output

    trainer = tiny_trainer(
        tmp_path,
        EarlyStoppingCallback(early_stopping_patience=2),
        kind=ScoredTrainer,
        max_steps=10,
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        metric_for_best_model=evaluation.settings.metric,
        greater_is_better=True,
        load_best_model_at_end=True,
    )
    trainer.train()
    assert trainer.state.global_step == 8
    assert trainer.state.best_metric == pytest.approx(0.8)
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-4")
