"""Native paged attention against reference.py, and that a token's bits are its own."""

import math
from dataclasses import replace

import pytest
import torch

from manylora.server.kernels.cpu import abi
from manylora.server.kernels.cpu.library import Kernels, open_kernels
from tests.server.kernels.cpu.attention_case import Heads, Row, attend, expected, make_case

# Decodes first, then chunks, as in a step; at and about the borders of blocks and of tiles of keys.
DECODES: tuple[Row, ...] = ((1, 1, 1), (2, 63, 1), (3, 64, 1), (4, 65, 1), (5, 130, 1), (6, 200, 1))
CHUNKS: tuple[Row, ...] = ((7, 5, 5), (8, 17, 3), (9, 128, 128), (10, 129, 2), (11, 200, 70), (12, 70, 64))
HEADS = (
    Heads(4, 4, 32),
    Heads(14, 2, 64),
    Heads(8, 1, 16),
    Heads(2, 1, 96),
    Heads(4, 2, 128),
    Heads(16, 2, 80),
    Heads(6, 2, 24),
    Heads(100, 1, 16),
    Heads(2, 2, 256),
)
TOLERANCE = 3e-6
LONG = 1000 + 2100  # over three segments of 1,024 keys


@pytest.fixture(params=[abi.KV_BF16, abi.KV_INT8], ids=["bf16", "int8"])
def form(request: pytest.FixtureRequest) -> int:
    """How keys and values are kept."""
    kept: int = request.param
    return kept


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 1, 7, 64, 100])
def test_a_mixed_step_gives_what_the_reference_gives(
    kernels: Kernels, form: int, heads: Heads, window: int | None
) -> None:
    for block_size in (16, 5, 1 if form == abi.KV_BF16 else 32):
        found = attend(kernels, make_case(DECODES + CHUNKS, heads, block_size, form), window)
        assert (found - expected(DECODES + CHUNKS, heads, window, form)).abs().max() < TOLERANCE


def test_every_short_context_gives_what_the_reference_gives(kernels: Kernels, form: int) -> None:
    rows, heads = tuple((context, context, 1) for context in range(1, 201)), Heads(7, 1, 32)
    case = make_case(rows, heads, 16, form)
    for window in (None, 33):
        assert (attend(kernels, case, window) - expected(rows, heads, window, form)).abs().max() < TOLERANCE


@pytest.mark.parametrize("window", [None, 1500])
def test_long_contexts_give_what_the_reference_gives(kernels: Kernels, form: int, window: int | None) -> None:
    rows, heads = ((1, LONG, 1), (2, 3000, 1), (3, LONG, 40)), Heads(4, 2, 32)
    found = attend(kernels, make_case(rows, heads, 16, form), window)
    assert (found - expected(rows, heads, window, form)).abs().max() < TOLERANCE


@pytest.mark.parametrize("heads", HEADS[:3])
@pytest.mark.parametrize("window", [None, 50])
def test_a_tokens_bits_do_not_depend_on_how_its_prompt_came(
    kernels: Kernels, form: int, heads: Heads, window: int | None
) -> None:
    whole = attend(kernels, make_case([(1, 300, 300)], heads, 16, form), window)
    for context in (1, 2, 63, 64, 65, 128, 200, 300):
        for queries in {1, 2, 13, 70} & set(range(context + 1)):
            part = attend(kernels, make_case([(1, context, queries)], heads, 5, form), window)
            assert torch.equal(part, whole[context - queries : context]), (context, queries)


@pytest.mark.parametrize("heads", HEADS[:3])
@pytest.mark.parametrize("window", [None, 50])
def test_a_tokens_bits_do_not_depend_on_its_company_or_the_number_of_threads(
    kernels: Kernels, form: int, heads: Heads, window: int | None
) -> None:
    rows = DECODES + CHUNKS
    together = make_case(rows, heads, 16, form)
    found = attend(kernels, together, window)
    alone = open_kernels(kernels.level, threads=1)
    assert isinstance(alone, Kernels)
    assert torch.equal(attend(alone, together, window), found)
    for row, start, stop in zip(rows, together.starts, together.starts[1:], strict=False):
        assert torch.equal(attend(kernels, make_case([row], heads, 16, form), window), found[start:stop]), row


def test_long_chunks_have_the_bits_of_long_decodes(kernels: Kernels, form: int) -> None:
    heads = Heads(7, 1, 32)
    chunk = attend(kernels, make_case([(1, LONG, 60)], heads, 16, form))
    for context in (LONG - 59, LONG - 28, LONG):
        alone = attend(kernels, make_case([(1, context, 1)], heads, 16, form))
        assert torch.equal(alone[0], chunk[context - LONG - 1])


@pytest.mark.parametrize("window", [None, 1500])
def test_a_long_decode_has_the_same_bits_alone_where_its_segments_are_pieces(
    kernels: Kernels, form: int, window: int | None
) -> None:
    """Alone it makes too few pieces for two threads; in company, and on one thread, it is one piece a KV head."""
    heads = Heads(4, 2, 32)
    rows = [(seed, context, 1) for seed, context in enumerate((LONG, 1024, 1025, 2048, 3000))]
    together = attend(kernels, make_case(rows, heads, 16, form), window)
    alone = open_kernels(kernels.level, threads=1)
    assert isinstance(alone, Kernels)
    for row, expected_row in zip(rows, together, strict=True):
        case = make_case([row], Heads(4, 2, 32), 16, form)
        assert torch.equal(attend(kernels, case, window)[0], expected_row), row
        assert torch.equal(attend(alone, case, window)[0], expected_row), row
    two = make_case([rows[0], (9, 40, 40)], heads, 16, form)
    assert torch.equal(attend(kernels, two, window)[0], together[0])
    assert (together - expected(tuple(rows), heads, window, form)).abs().max() < TOLERANCE


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 0.0])
@pytest.mark.parametrize("window", [None, 50])
def test_what_a_row_does_not_own_is_not_felt(
    kernels: Kernels, form: int, garbage: float, window: int | None
) -> None:
    rows = DECODES + CHUNKS
    clean = attend(kernels, make_case(rows, Heads(14, 2, 64), 16, form, garbage=1.0), window)
    found = attend(kernels, make_case(rows, Heads(14, 2, 64), 16, form, garbage=garbage), window)
    assert torch.equal(found, clean)
    assert found.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_a_rows_own_fault_is_felt_by_the_tokens_that_see_it_alone(
    kernels: Kernels, form: int, bad: float, which: int
) -> None:
    """Of keys (0) or values (1)."""
    case = make_case([(1, 200, 200), (2, 90, 90)], Heads(14, 2, 64), 16, form)
    clean = attend(kernels, case, 40)
    broken = replace(case, kv=case.kv.clone())
    # One element of KV head 1 at position 100.
    broken.kv[which, case.own_slots(0)[100], 1, 3] = bad
    found, expected = attend(kernels, broken, 40), broken.expected(40)
    touched = (found != clean) | found.isnan()
    assert not touched[:100].any()
    assert not touched[140:].any()
    assert not touched[:, : 7 * 64].any()
    assert torch.equal(found.isfinite(), expected.isfinite())


def test_what_other_sequences_hold_changes_nothing(kernels: Kernels, form: int) -> None:
    rows = ((1, 100, 1), (2, 150, 30), (3, 77, 77))
    case = make_case(rows, Heads(14, 2, 64), 5, form)
    clean = attend(kernels, case)
    for row in range(3):
        broken = replace(case, kv=case.kv.clone())
        broken.kv[:, case.own_slots(row)] = math.nan
        found = attend(kernels, broken)
        for other in {0, 1, 2} - {row}:
            own = slice(case.starts[other], case.starts[other + 1])
            assert torch.equal(found[own], clean[own])
