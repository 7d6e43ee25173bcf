"""Whether an adapter costs more than the base alone, by the losses of the same rows."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from manylora.training.loop.against_base import worse_than_base


class Rows:
    """A run that answers with these losses: (with the adapter, without it)."""

    def __init__(
        self, held_out: Sequence[Sequence[float]], recent: Sequence[Sequence[float]] = ((), ())
    ) -> None:
        self.held_out, self.recent = held_out, recent
        self.at = 0

    @contextmanager
    def alone(self) -> Iterator[None]:
        self.at = 1
        yield
        self.at = 0

    def recent_losses(self) -> list[float]:
        return list(self.recent[self.at])

    def held_out_losses(self) -> list[float]:
        return list(self.held_out[self.at])


def said(held_out: Sequence[Sequence[float]], recent: Sequence[Sequence[float]] = ((), ())) -> str | None:
    run = Rows(held_out, recent)
    return worse_than_base(run, run.alone)


def test_both_costs_are_said() -> None:
    sentence = said(([4.5, 4.3], [3.2, 3.0]))
    assert sentence is not None
    assert sentence.startswith(
        "worse than the base alone: its 2 held-out rows cost 4.4 nats a token with the adapter and 3.1 without it."
    )


def test_the_last_rows_are_asked_where_nothing_is_held_out() -> None:
    sentence = said(((), ()), ([2.0], [1.0]))
    assert sentence is not None
    assert "its 1 last rows cost 2 nats" in sentence
    assert said(([1.0, 1.1], [2.0, 2.2]), ([9.0], [1.0])) is None, "held-out rows say more"


def test_what_is_no_number_any_more_is_worse() -> None:
    sentence = said(([math.nan, 2.0], [3.0, 3.0]))
    assert sentence is not None
    assert "cost no number any more with the adapter and 3 without it" in sentence


@pytest.mark.parametrize(
    "rows",
    [
        ([1.0, 2.0], [3.0, 3.0]),
        ([3.01, 3.02], [3.0, 3.0]),
        ([9.0, 0.1, 2.0, 3.3], [3.0, 3.0, 3.0, 3.0]),
        ([2.0], [math.nan]),
        ([], []),
    ],
    ids=["better", "hardly", "by chance", "no base", "no rows"],
)
def test_nothing_is_said_of_what_is_not_worse(rows: Sequence[Sequence[float]]) -> None:
    assert said(rows) is None


def test_rows_that_do_not_fit_are_no_reason_to_end_there() -> None:
    class Full(Rows):
        def held_out_losses(self) -> list[float]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    run = Full(((), ()))
    assert worse_than_base(run, run.alone) is None

    class Broken(Rows):
        def held_out_losses(self) -> list[float]:
            raise RuntimeError("something else")

    broken = Broken(((), ()))
    with pytest.raises(RuntimeError, match="something else"):
        worse_than_base(broken, broken.alone)
