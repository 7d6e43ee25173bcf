"""What is followed is what was printed, and the table's faults are those of a merge that answers otherwise."""

from dataclasses import replace
from pathlib import Path

import pytest

from manylora.loadtest.same_answers import METHODS, Job, Outcome, report, right, serve_words, train_words
from manylora.training.parsing import parse_arguments

GOOD = Outcome("a", 200, 0, 81, True, 81, 80, 82, 190)


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
        ({"trained": 0, "served": 0, "merged": 0, "merged_served": 0}, "learnt nothing"),
        ({"resumed": False}, "resumed otherwise"),
        ({"trained": None, "served": None, "same": None}, ""),
    ],
)
def test_what_is_not_as_it_must_be_is_a_fault(changes: dict[str, int | None], says: str) -> None:
    found = "; ".join(replace(GOOD, **changes).faults())  # type: ignore[arg-type]  # its own fields
    assert says in found
    assert bool(found) == bool(says)


def test_answers_are_compared_without_the_space_around_them() -> None:
    assert right(["a ", "b", "c"], ["a", "b", "d"]) == 2


def test_a_line_for_each_method_and_a_dash_for_what_was_not_asked() -> None:
    lines = report([GOOD, replace(GOOD, method="b", served=None, resumed=None)]).splitlines()
    assert lines[2].split() == ["a", "0", "81", "81", "80", "82", "190", "to", "the", "bit"]
    assert lines[3].split() == ["b", "0", "81", "–", "80", "82", "190", "–"]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_s_flags_are_the_command_s(method: object, tmp_path: Path) -> None:
    job = Job(tmp_path / "base", tmp_path / "gptq", tmp_path, steps=4, batch=2, rate=1e-3, questions=8)
    words = train_words(job, method, tmp_path / "out")  # type: ignore[arg-type]  # one of METHODS
    arguments = parse_arguments(words[1:])
    assert arguments.training.max_steps == 4
