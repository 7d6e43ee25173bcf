"""Which matrices an adapter is on, and their ranks, by the names that PEFT gives them."""

import pytest

from manylora.training.errors import InvalidArgument
from manylora.training.memory.adapted import adapted_layers, factor_values, unused_ranks
from manylora.training.memory.run_shape import RunShape
from manylora.training.memory.shape import ModelShape
from tests.training.memory.test_shape import FIRST_QWEN_7B

FIRST_QWEN = ModelShape.from_config(FIRST_QWEN_7B)


def test_the_first_qwens_two_matrices_of_one_name_are_told_apart_by_their_paths() -> None:
    plain = RunShape(rank=4, targets=("c_proj",))
    one_more = RunShape(rank=4, targets=("c_proj",), rank_pattern=(("transformer.h.3.mlp.c_proj", 5),))
    assert factor_values(FIRST_QWEN, one_more) - factor_values(FIRST_QWEN, plain) == 11008 + 4096
    only = RunShape(rank=4, targets=("h.3.attn.c_proj",))
    assert factor_values(FIRST_QWEN, only) == 4 * (4096 + 4096)
    assert sorted(adapted_layers(FIRST_QWEN, only).values()) == [1, 31]


def test_a_path_that_no_layer_has_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"h\.32\.mlp\.w1"):
        adapted_layers(FIRST_QWEN, RunShape(targets=("h.31.mlp.w1", "h.32.mlp.w1")))


def test_keys_that_mean_nothing_are_told() -> None:
    run = RunShape(targets=("w1",), rank_pattern=(("w1", 8), ("w2", 8), (r".*\.mlp\.w.", 4)))
    assert unused_ranks(FIRST_QWEN, run) == ("w2",)


@pytest.mark.parametrize(("pattern", "named"), [((("(", 8),), "regular expression"), ((("w1", 0),), "w1=0")])
def test_a_pattern_that_can_not_be_read_is_refused(pattern: tuple[tuple[str, int], ...], named: str) -> None:
    with pytest.raises(InvalidArgument, match=named):
        RunShape(rank_pattern=pattern)
