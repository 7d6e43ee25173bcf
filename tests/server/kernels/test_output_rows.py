"""Which rank rows are gains follows what is written and moved, whatever was there before."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from manylora.adapters.types import AdapterWeights, LoraPair
from manylora.server.kernels.output_rows import OutputRows
from manylora.server.kernels.step import RankRange

ROWS = 24


def weights(gained: bool, shifted: bool) -> AdapterWeights:
    pairs = {"x.q_proj": LoraPair(torch.ones(1, 1), torch.ones(1, 1))}
    one = {"x.q_proj": torch.ones(1)}
    return AdapterWeights(pairs, one if gained else {}, one if shifted else {})


Change = tuple[bool, int, int, int, bool, bool]
"""(whether rows are written or moved, start, rank, target, whether there are gains, and offsets)"""


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.integers(0, 20),
            st.integers(3, 4),
            st.integers(0, 20),
            st.booleans(),
            st.booleans(),
        )
    )
)
def test_rows_are_those_of_what_was_written_last(changes: list[Change]) -> None:
    rows = OutputRows(("q_proj", "o_proj"))
    model = ["factor"] * ROWS
    for write, start, rank, target, gained, shifted in changes:
        if write:
            rows.written({"q_proj": RankRange(start, rank)}, weights(gained, shifted))
            others = ["offset"] * shifted + ["gain"] * gained
            model[start : start + rank] = ["factor"] * (rank - len(others)) + others
        elif target <= start:
            rows.moved("q_proj", RankRange(start, rank), target)
            moved = model[start : start + rank]
            model[start : start + rank] = ["factor"] * rank
            model[target : target + rank] = moved
        single = [RankRange(row, 1) for row in range(ROWS)]
        assert [rows.gain("q_proj", each) is not None for each in single] == [m == "gain" for m in model]
        found = [rows.offset("q_proj", each) is not None for each in single]
        assert found == [m == "offset" for m in model]
        assert bool(rows) == any(m != "factor" for m in model)
        assert rows.gain("o_proj", RankRange(0, ROWS)) is None


def test_the_last_rows_of_a_range_are_no_factors() -> None:
    rows = OutputRows(("q_proj",))
    owned, next_one = RankRange(3, 5), RankRange(8, 5)
    for gained, shifted, gain, offset, rank in (
        (True, False, 7, None, 4),
        (False, True, None, 7, 4),
        (True, True, 7, 6, 3),
        (False, False, None, None, 5),
    ):
        before = rows.changes
        rows.written({"q_proj": owned}, weights(gained, shifted))
        assert rows.changes > before
        assert (rows.gain("q_proj", owned), rows.offset("q_proj", owned)) == (gain, offset)
        assert rows.factors("q_proj", owned) == RankRange(3, rank)
        assert rows.factors("q_proj", next_one) == next_one


def test_a_range_may_hold_an_offset_alone() -> None:
    rows = OutputRows(("q_proj",))
    owned = RankRange(4, 1)
    rows.written({"q_proj": RankRange(3, 1)}, weights(gained=False, shifted=True))
    rows.written({"q_proj": owned}, weights(gained=True, shifted=False))
    assert (rows.gain("q_proj", owned), rows.offset("q_proj", owned)) == (4, None)
    assert rows.factors("q_proj", owned) == RankRange(4, 0)
