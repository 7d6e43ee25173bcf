"""Counts of requests: by the id of each adapter and by a mixture's name, the last used kept."""

from collections.abc import Iterator
from itertools import count

import pytest

from manylora.server.catalog import ResolvedModel, ResolvedPart, Used, usage
from manylora.server.catalog.types import MIXTURE_LABEL
from manylora.server.catalog.usage import Usage


@pytest.fixture
def clock() -> Iterator[int]:
    return count(100)


def single(adapter_id: int) -> ResolvedModel:
    return ResolvedModel(((adapter_id, 1.0),), f"a{adapter_id}", f"a{adapter_id}")


def mixed(name: str, label: str) -> ResolvedModel:
    parts = tuple(ResolvedPart(number, f"a{number}", 1, weight) for number, weight in ((1, 0.5), (2, 0.0)))
    return ResolvedModel(((1, 0.5),), name, label, parts)


def test_what_has_a_say_counts_and_a_mixture_by_its_name(clock: Iterator[int]) -> None:
    used = Usage(lambda: float(next(clock)))
    used.count(ResolvedModel((), "base", "base"), 5)
    used.count(single(1), 2)
    used.count(mixed("both", "both"), 1)
    used.count(mixed("a1:0.5+a2:0", MIXTURE_LABEL), 1)
    assert [used.of(each) for each in (1, 2, "both", "a1:0.5+a2:0")] == [
        *(Used(4, 103), Used(), Used(1, 101), Used())
    ]
    used.forget("both")
    assert used.of("both") == Used()


def test_the_last_used_are_remembered(clock: Iterator[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "MOST_REMEMBERED", 3)
    used = Usage(lambda: float(next(clock)))
    for adapter_id in (1, 2, 3, 1, 4):
        used.count(single(adapter_id), 1)
    assert [used.of(each).requests for each in (1, 2, 3, 4)] == [2, 0, 1, 1]
