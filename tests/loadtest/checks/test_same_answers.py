"""What is followed is what was printed, and the table's faults are those of a merge that answers otherwise."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
from typer.testing import CliRunner

from manylora.cli import app
from manylora.demo.task_data import write_tasks
from manylora.loadtest.checks.model_answers import on_other_form, right, serve_words
from manylora.loadtest.checks.same_answers import (
    HEAD,
    METHODS,
    Doors,
    Failed,
    Job,
    Method,
    Outcome,
    line,
    report,
    through,
    train_words,
)
from manylora.served_generation import ServedBase, ServedGeneration
from manylora.training.parsing import parse_arguments

DEMO = Path(__file__).resolve().parents[3] / "demo" / "base"
GOOD = Outcome("a", 200, 0, 81, True, 81, 80, 82, 190)


def run_here(words: Sequence[str], log: Path) -> str:
    """Run a command of manylora in this process and return what it printed."""
    done = CliRunner(env={"COLUMNS": "300"}).invoke(app, list(words))
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    log.write_text(done.output)
    return done.output


def ask_here(
    words: Sequence[str], model: str | None, questions: Sequence[str], new_tokens: int, _: Path
) -> list[str]:
    """Answer with the engine in this process, with the base and the flags that the words give."""
    base, *flags = words
    adapters = dict(each.split("=", 1) for each in flags if "=" in each)
    served = ServedBase(
        Path(base),
        quantization="none" if "none" in flags else "auto",
        double_quant="--double-quant" in flags,
    )
    with ServedGeneration(served) as generate:
        conversations = [[{"role": "user", "content": question}] for question in questions]
        return generate(conversations, None if model is None else Path(adapters[model]), new_tokens)


HERE = Doors(run_here, ask_here)


SMALL = ("rank 4, 8, 16", "PiSSA")
"""Other ways to train are followed to the end in tests/manylora/test_train_command.py."""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    place = tmp_path_factory.mktemp("same")
    steps, batch, questions = 8, 8, 12
    write_tasks(place, steps * batch, questions)
    return Job(
        *(DEMO, place / "gptq", place, steps, batch, 1e-2, questions), "json", resume=True, other_form=False
    )


@pytest.mark.parametrize(
    "method", [each for each in METHODS if each.name in SMALL], ids=lambda each: each.name
)
def test_a_method_learns_resumes_and_answers_alike_served_and_merged(
    job: Job, method: Method, tmp_path: Path
) -> None:
    outcome = through(job, method, tmp_path, HERE)
    assert outcome.faults() == []
    assert outcome.resumed
    assert min(outcome.merged, outcome.merged_served) >= job.questions // 2
    assert through(job, method, tmp_path, Doors(nobody, nobody)) == outcome


def nobody(*_: object) -> NoReturn:
    """What is there is not done again."""
    raise AssertionError("something was done again")


def test_what_another_run_left_is_not_taken_for_this_one(job: Job, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="done again"):
        through(job, METHODS[0], tmp_path, Doors(nobody, nobody))
    with pytest.raises(Failed, match=r"of another run \(steps, questions\)"):
        through(replace(job, steps=9, questions=3), METHODS[0], tmp_path, Doors(nobody, nobody))


def test_the_last_line_that_says_how_to_serve_is_followed_word_for_word() -> None:
    first, last = "serve b --adapter 'n=/x y'", "serve 'a b' --quantization none"
    said = f"· one\n· Serve it: manylora {first}\nServe it: manylora {last}\n"
    assert serve_words(said) == ["a b", "--quantization", "none"]
    assert serve_words("· the adapter is in out") is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, ""),
        ({"merged_served": 0}, "merged and served: 0 right, not 81"),
        ({"merged_served": 78}, "merged and served: 78 right, not 81"),
        ({"merged": 57}, "merged: 57 right, not 81"),
        ({"trained": 115}, "served: 81 right, not 115"),
        ({"trained": None, "merged_served": 60}, "merged and served: 60 right, not 80"),
        ({"trained": None, "merged": 0, "merged_served": 0, "served": None}, "learnt nothing"),
        ({"trained": 0, "served": 0, "merged": 0, "merged_served": 0}, "learnt nothing"),
        ({"resumed": False}, "resumed otherwise"),
        ({"trained": None, "served": None, "same": None}, ""),
    ],
)
def test_what_is_not_as_it_must_be_is_a_fault(changes: dict[str, int | None], says: str) -> None:
    found = "; ".join(replace(GOOD, **changes).faults())  # type: ignore[arg-type]  # its own fields
    assert says in found
    assert bool(found) == bool(says)


def test_of_few_questions_one_may_differ() -> None:
    few = replace(GOOD, questions=12, trained=11, served=11, merged=11, merged_served=10, same=11)
    assert few.faults() == []
    assert replace(few, merged_served=9).faults() == ["merged and served: 9 right, not 11"]


@pytest.mark.parametrize(
    ("words", "otherwise"),
    [
        (["b", "--quantization", "none", "--adapter", "a=x"], ["b", "--adapter", "a=x"]),
        (["b", "--adapter", "a=x"], ["b", "--adapter", "a=x", "--quantization", "none"]),
        (
            ["b", "--double-quant", "--adapter", "a=x"],
            ["b", "--adapter", "a=x", "--quantization", "none"],
        ),
    ],
)
def test_the_other_form_of_a_base_is_nf4_or_16_bits(words: list[str], otherwise: list[str]) -> None:
    assert on_other_form(words) == otherwise


def test_answers_are_compared_without_the_space_around_them() -> None:
    assert right(["a ", "b", "c"], ["a", "b", "d"]) == 2


def test_a_line_for_each_method_and_a_dash_for_what_was_not_asked() -> None:
    other = replace(GOOD, method="b", served=None, resumed=None, other_form=37)
    assert report(GOOD).split() == ["a", "0", "81", "81", "–", "80", "82", "190", "to", "the", "bit"]
    assert report(other).split() == ["b", "0", "81", "–", "37", "80", "82", "190", "–"]
    assert len(report(GOOD)) == len(report(other)) == len(line(HEAD))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_s_flags_are_the_command_s(method: Method, job: Job, tmp_path: Path) -> None:
    arguments = parse_arguments(train_words(job, method, tmp_path / "out")[1:])
    assert arguments.training.max_steps == job.steps
