"""Mixed batches: who owns which token, what is predicted where, and how documents of similar length meet."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.training.tasks.batch import IGNORED, Row, mix, trained_tokens


def row(*tokens: int, prompt: int = 1, starts: tuple[int, ...] = ()) -> Row:
    labels = [IGNORED] * prompt + list(tokens[prompt:])
    if not starts:
        return {"input_ids": list(tokens), "labels": labels}
    positions = [at - max(start for start in starts if start <= at) for at in range(len(tokens))]
    return {"input_ids": list(tokens), "labels": labels, "position_ids": positions}


def test_tasks_own_spans_of_one_sequence() -> None:
    batch = mix([[row(1, 2, 3), row(4, 5)], [], [row(6, 7, 8, 9, prompt=2)]])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert batch.spans == ((0, 5), (5, 5), (5, 9))
    assert batch.predicting.tolist() == [0, 1, 3, 6, 7]
    assert batch.targets.tolist() == [2, 3, 5, 8, 9]
    assert batch.trained_spans == ((0, 3), (3, 3), (3, 5))


def test_a_packed_row_is_several_documents_and_none_predicts_the_next_ones_first_token() -> None:
    packed = row(1, 2, 3, 4, 5, prompt=0, starts=(0, 3))
    batch = mix([[packed]])
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.targets.tolist() == [2, 3, 5]
    assert trained_tokens(packed) == 3
    assert sum(grid.documents for grid in batch.grids) == 2


@given(st.lists(st.integers(1, 400), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_every_token_has_one_cell_in_the_line_and_place_of_its_document(lengths: list[int]) -> None:
    batch = mix([[row(*range(length), prompt=0) for length in lengths]])
    assert sorted(torch.cat([grid.tokens for grid in batch.grids]).tolist()) == list(range(sum(lengths)))
    assert sum(grid.documents for grid in batch.grids) == len(lengths)
    for grid in batch.grids:
        assert len(set(grid.cells.tolist())) == grid.cells.numel()
        assert grid.cells.max() < grid.documents * grid.length
        assert torch.equal(grid.cells % grid.length, batch.position_ids[0, grid.tokens])


def test_documents_of_very_different_lengths_do_not_share_a_grid() -> None:
    batch = mix([[row(*range(400), prompt=0), *(row(*range(20), prompt=0) for _ in range(8))]])
    assert [(grid.documents, grid.length) for grid in batch.grids] == [(1, 400), (8, 20)]
    alike = mix([[row(*range(length), prompt=0) for length in (20, 18, 17)]])
    assert len(alike.grids) == 1
