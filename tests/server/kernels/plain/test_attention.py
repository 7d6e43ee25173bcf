"""Paged attention over mixed steps against reference.py, and that against torch's own attention."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from manylora.server.kernels.plain import attention
from manylora.server.kernels.plain.attention import attend, plan_attention
from manylora.server.kernels.plain.kv_cache import CachedRows
from manylora.server.kernels.reference import paged_attention
from manylora.server.kernels.step import AttentionMetadata
from tests.server.model.steps import ints

# (context, queries) of each row: decodes and chunks, at and about the borders of blocks, padding and segments.
MIXED = (
    (1, 1),
    (5, 5),
    (64, 1),
    (65, 1),
    (17, 3),
    (128, 128),
    (129, 2),
    (300, 1),
    (63, 63),
    (200, 70),
    (2, 2),
)
DECODES = ((1, 1), (2, 1), (63, 1), (64, 1), (66, 1), (127, 1), (129, 1), (257, 1))
CHUNKS = ((40, 40), (130, 17), (257, 200), (2, 2))
# (heads, KV heads, head dim)
HEADS = ((4, 4, 32), (14, 2, 64), (6, 2, 24), (8, 1, 16))
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}


@dataclass(frozen=True)
class Case:
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    metadata: AttentionMetadata
    block_size: int


def make_case(
    rows: Sequence[tuple[int, int]],
    heads: tuple[int, int, int],
    block_size: int,
    dtype: torch.dtype,
    seed: int = 0,
) -> Case:
    """Blocks are dealt out in random order; what no row owns is NaN: unused blocks, the null block, ends of blocks."""
    generator = torch.Generator().manual_seed(seed)
    query_heads, kv_heads, dim = heads
    needed = [-(-context // block_size) for context, _ in rows]
    order = (torch.randperm(sum(needed) + 3, generator=generator) + 1).tolist()
    slots = (len(order) + 1) * block_size
    tables = np.zeros((len(rows), max(needed) + 2), dtype=np.int32)
    k_cache, v_cache = (torch.full((slots, kv_heads, dim), torch.nan, dtype=dtype) for _ in range(2))
    positions: list[int] = []
    new_slots: list[int] = []
    starts = [0]
    for row, (context, queries) in enumerate(rows):
        for block in range(needed[row]):
            tables[row, block] = order.pop()
        index = np.arange(context)
        own = tables[row][index // block_size] * block_size + index % block_size
        for cache in (k_cache, v_cache):
            cache[own] = torch.randn(context, kv_heads, dim, generator=generator).to(dtype)
        positions += range(context - queries, context)
        new_slots += own[context - queries :].tolist()
        starts.append(starts[-1] + queries)
    metadata = AttentionMetadata(
        ints(positions), ints(new_slots), ints(starts), ints([context for context, _ in rows]), tables
    )
    q = torch.randn(starts[-1], query_heads, dim, generator=generator).to(dtype)
    return Case(q, k_cache, v_cache, metadata, block_size)


def run(case: Case, window: int | None, padding: int = 0, fused: torch.dtype | None = None) -> Tensor:
    plan = plan_attention(case.metadata, case.block_size, {window, None}, case.q.device, fused)
    out = case.q.new_full((case.q.shape[0] + padding, *case.q.shape[1:]), 7.0)
    attend(case.q, CachedRows(case.k_cache), CachedRows(case.v_cache), plan, window, out)
    return out


def assert_like_reference(case: Case, window: int | None) -> None:
    expected = paged_attention(case.q, case.k_cache, case.v_cache, case.metadata, case.block_size, window)
    tolerance = TOLERANCE[case.q.dtype]
    torch.testing.assert_close(run(case, window).float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 1, 20, 64, 150])
def test_mixed_steps(heads: tuple[int, int, int], window: int | None, dtype: torch.dtype) -> None:
    assert_like_reference(make_case(MIXED, heads, 16, dtype), window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 1, 150])
def test_by_torchs_own_kernel(heads: tuple[int, int, int], window: int | None, dtype: torch.dtype) -> None:
    """As a GPU attends: in the type of q, so that what bfloat16 loses is lost at each product."""
    case = make_case(MIXED, heads, 16, dtype)
    expected = paged_attention(case.q, case.k_cache, case.v_cache, case.metadata, case.block_size, window)
    tolerance = 2e-6 if dtype is torch.float32 else 2**-6
    found = run(case, window, padding=2, fused=dtype)
    torch.testing.assert_close(found[:-2].float(), expected, rtol=tolerance, atol=tolerance)
    assert (found[-2:] == 7).all()


def test_a_chunk_whose_masks_would_be_too_large_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of 2,048 queries behind 131,072 keys would take 0.8 GB for each window."""
    case = make_case(((500, 300), (90, 20)), HEADS[0], 16, torch.bfloat16)
    monkeypatch.setattr(attention, "CUDA_SCRATCH_BYTES", 2 * 3 * 128 * 20)
    plan = plan_attention(case.metadata, case.block_size, {None, 64}, case.q.device, torch.bfloat16)
    assert [bool(chunk.masks) for chunk in plan.chunks] == [False, True]
    expected = paged_attention(case.q, case.k_cache, case.v_cache, case.metadata, case.block_size, 64)
    found = run(case, 64, fused=torch.bfloat16)
    torch.testing.assert_close(found.float(), expected, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("rows", [DECODES, CHUNKS, ((1, 1),), ((500, 500),)])
@pytest.mark.parametrize("block_size", [1, 7, 16, 64])
def test_any_block_size(rows: Sequence[tuple[int, int]], block_size: int) -> None:
    assert_like_reference(make_case(rows, (6, 2, 24), block_size, torch.float32), None)
    assert_like_reference(make_case(rows, (6, 2, 24), block_size, torch.float32), 33)


@pytest.mark.parametrize("window", [None, 50])
def test_the_reference_is_torchs_attention(window: int | None) -> None:
    case = make_case(MIXED, (6, 2, 24), 16, torch.float32)
    ours = paged_attention(case.q, case.k_cache, case.v_cache, case.metadata, 16, window)
    for row, (context, queries) in enumerate(MIXED):
        index = np.arange(context)
        slots = case.metadata.block_tables[row][index // 16] * 16 + index % 16
        k, v = (cache[slots].transpose(0, 1)[None] for cache in (case.k_cache, case.v_cache))
        first = case.metadata.query_start[row]
        q = case.q[first : first + queries].transpose(0, 1)[None]
        position = torch.arange(context - queries, context)[:, None]
        seen = torch.arange(context) <= position
        if window is not None:
            seen &= torch.arange(context) > position - window
        theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1)
        torch.testing.assert_close(ours[first : first + queries], theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 20])
def test_a_row_alone_has_the_same_bits(window: int | None, dtype: torch.dtype) -> None:
    case = make_case(MIXED, (6, 2, 24), 16, dtype)
    together = run(case, window)
    metadata = case.metadata
    for row, context in enumerate(metadata.context_lens.tolist()):
        tokens = slice(metadata.query_start[row], metadata.query_start[row + 1])
        single = AttentionMetadata(
            metadata.positions[tokens],
            metadata.slots[tokens],
            ints([0, tokens.stop - tokens.start]),
            ints([context]),
            metadata.block_tables[row : row + 1, : -(-context // 16)],
        )
        alone = run(Case(case.q[tokens], case.k_cache, case.v_cache, single, 16), window)
        assert torch.equal(alone, together[tokens])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("window", [None, 20])
def test_a_row_that_is_not_finite_is_felt_by_no_other(window: int | None, poison: float) -> None:
    """Decodes and chunks in one step: queries, keys and values of one after the other are spoiled."""
    case = make_case(MIXED, (6, 2, 24), 16, torch.float32)
    sound = run(case, window)
    metadata = case.metadata
    for row, context in enumerate(metadata.context_lens.tolist()):
        index = np.arange(context)
        own = metadata.block_tables[row][index // 16] * 16 + index % 16
        spoiled = Case(case.q.clone(), case.k_cache.clone(), case.v_cache.clone(), metadata, 16)
        tokens = slice(metadata.query_start[row], metadata.query_start[row + 1])
        spoiled.q[tokens] = spoiled.k_cache[own] = spoiled.v_cache[own] = poison
        found = run(spoiled, window)
        assert not found[tokens].isfinite().any()
        found[tokens] = sound[tokens]
        assert torch.equal(found, sound)


@pytest.mark.parametrize("scratch", [1, 50_000, 400_000])
def test_bits_do_not_depend_on_how_much_is_gathered_at_a_time(
    scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for heads in HEADS:
            case = make_case(MIXED, heads, 16, dtype)
            whole = [run(case, window) for window in (None, 20)]
            with monkeypatch.context() as patch:
                patch.setattr(attention, "SCRATCH_BYTES", scratch)
                parts = [run(case, window) for window in (None, 20)]
            assert all(map(torch.equal, whole, parts))


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch types none of it
    """Keeps the bytes of the largest tensor that an op makes; views and what is written in place are none."""

    nbytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        fresh = all(returned.alias_info is None for returned in func._schema.returns)
        if fresh and isinstance(made, Tensor):
            self.nbytes = max(self.nbytes, made.nbytes)
        return made


@pytest.mark.parametrize(("rows", "queries"), [(256, 1), (1, 512)], ids=["decodes", "a chunk"])
def test_long_contexts_of_a_large_model_are_gathered_in_parts(rows: int, queries: int) -> None:
    """256 sequences of 4,096 tokens with the 32 heads of a 7B would take 34 GB in float32. Nothing is computed here."""
    context, block, heads, dim = 4096, 16, 32, 128
    meta = torch.device("meta")
    slots = (rows * context // block + 1) * block
    cache = torch.empty(slots, heads, dim, dtype=torch.bfloat16, device=meta)
    q = torch.empty(rows * queries, heads, dim, dtype=torch.bfloat16, device=meta)
    metadata = AttentionMetadata(
        np.zeros(rows * queries, dtype=np.int32),
        np.zeros(rows * queries, dtype=np.int32),
        ints(range(0, rows * queries + 1, queries)),
        ints([context] * rows),
        np.zeros((rows, context // block), dtype=np.int32),
    )
    with Largest() as made:  # type: ignore[no-untyped-call]
        attend(
            q,
            CachedRows(cache),
            CachedRows(cache),
            plan_attention(metadata, block, {None}, meta),
            None,
            torch.empty_like(q),
        )
    assert made.nbytes <= attention.SCRATCH_BYTES


def test_rows_past_the_steps_tokens_are_left_alone() -> None:
    case = make_case(MIXED, (4, 4, 32), 16, torch.float32)
    out = run(case, None, padding=5)
    assert torch.equal(out[:-5], run(case, None))
    assert (out[-5:] == 7.0).all()


def test_a_step_of_nothing() -> None:
    empty = ints([])
    metadata = AttentionMetadata(empty, empty, ints([0]), empty, np.zeros((0, 4), dtype=np.int32))
    case = Case(torch.zeros(0, 4, 32), torch.zeros(16, 4, 32), torch.zeros(16, 4, 32), metadata, 16)
    assert run(case, None).shape == (0, 4, 32)


def test_a_row_without_tokens_is_passed_over() -> None:
    case = make_case(((20, 5), (30, 1)), (4, 4, 32), 16, torch.float32)
    metadata = case.metadata
    with_idle = AttentionMetadata(
        metadata.positions,
        metadata.slots,
        ints([0, 5, 5, 6]),
        ints([20, 20, 30]),
        metadata.block_tables[[0, 0, 1]],
    )
    idle = Case(case.q, case.k_cache, case.v_cache, with_idle, 16)
    assert torch.equal(run(idle, None), run(case, None))
