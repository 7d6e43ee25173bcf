"""Paged attention in plain torch, over decode rows in padded batches and prompt chunks one by one.

What a token gets is the same to the bit whether its prompt came whole or in chunks, alone or in a batch: matmuls
have enough rows that their number doesn't show, contexts are padded to lengths that depend on the context alone,
and the softmax's denominator is summed by the same matmul as its numerator, in the order of the keys, where what
is masked adds exact zeros.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from server.kernels.invariance import MATMUL_LIMITS
from server.kernels.metadata import AttentionMetadata

LEAST_CONTEXT = 64
# Scores of one matmul at most, in elements: bounds the memory of a long chunk over a long context.
MOST_SCORES = 1 << 24
# Scores and sums are float32 in every dtype.
LEAST_ROWS = MATMUL_LIMITS[torch.float32].least_rows


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Sequences with one query each whose contexts are padded to the same length L."""

    tokens: Tensor
    """int64 [n]: where their queries are among the step's tokens."""
    slots: Tensor
    """int64 [n · L]: KV slots of their contexts, in order; padding points at slot 0 and is masked."""
    positions: Tensor
    """int64 [n, 1]: position of each query."""
    length: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A sequence with several queries."""

    start: int
    stop: int
    slots: Tensor
    """int64 [L]"""
    positions: Tensor
    """int64 [stop − start]"""


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Index tensors of a step, made once and used by every layer."""

    positions: Tensor
    slots: Tensor
    groups: tuple[RowGroup, ...]
    chunks: tuple[Chunk, ...]


def padded_length(context: int) -> int:
    """Return the length that a context is padded to: a power of two, or a multiple of 1024 beyond that."""
    if context > 1024:
        return -(-context // 1024) * 1024
    return max(LEAST_CONTEXT, 1 << (context - 1).bit_length())


def plan_attention(metadata: AttentionMetadata, block_size: int) -> AttentionPlan:
    """Turn a step's rows into index tensors."""
    decodes: dict[int, list[int]] = defaultdict(list)
    chunks = []
    starts = metadata.query_start
    for row, context in enumerate(metadata.context_lens):
        length = padded_length(context)
        if starts[row + 1] - starts[row] == 1:
            decodes[length].append(row)
        else:
            slots = _slots(metadata.block_tables[row : row + 1], length, block_size)
            positions = metadata.positions[starts[row] : starts[row + 1]]
            chunks.append(Chunk(starts[row], starts[row + 1], slots, positions))
    groups = []
    for length, rows in decodes.items():
        tokens = torch.tensor([starts[row] for row in rows], device=metadata.positions.device)
        tables = metadata.block_tables[torch.tensor(rows, device=tokens.device)]
        slots = _slots(tables, length, block_size)
        groups.append(RowGroup(tokens, slots, metadata.positions[tokens][:, None], length))
    return AttentionPlan(metadata.positions, metadata.slots, tuple(groups), tuple(chunks))


def _slots(tables: Tensor, length: int, block_size: int) -> Tensor:
    """Return the slots of the first ``length`` tokens of each table, row after row; 0 past a table's end."""
    blocks = -(-length // block_size)
    if tables.shape[1] < blocks:
        tables = torch.nn.functional.pad(tables, (0, blocks - tables.shape[1]))
    offsets = torch.arange(block_size, device=tables.device)
    slots = tables[:, :blocks, None] * block_size + offsets
    return slots.flatten(1)[:, :length].reshape(-1)


def attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, window: int | None, out: Tensor
) -> None:
    """Fill ``out`` [T, H, D] at the plan's tokens; rows of no sequence are left alone. Shapes as in reference.py."""
    heads, dim = q.shape[1:]
    kv_heads = k_cache.shape[1]
    for group in plan.groups:
        count = len(group.tokens)
        shape = (count, group.length, kv_heads, dim)
        k = k_cache.index_select(0, group.slots).view(shape).permute(0, 2, 1, 3)
        v = v_cache.index_select(0, group.slots).view(shape).permute(0, 2, 1, 3)
        queries = q[group.tokens].view(count, kv_heads, heads // kv_heads, dim)
        keys = torch.arange(group.length, device=q.device)
        seen = _seen(group.positions, keys, window)[:, None, None, :]
        out[group.tokens] = _softmax_product(queries, k, v, seen).reshape(count, heads, dim).to(out.dtype)
    for chunk in plan.chunks:
        _attend_chunk(q, k_cache, v_cache, chunk, window, out)


def _attend_chunk(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, chunk: Chunk, window: int | None, out: Tensor
) -> None:
    heads, dim = q.shape[1:]
    kv_heads = k_cache.shape[1]
    k = k_cache.index_select(0, chunk.slots).permute(1, 0, 2)
    v = v_cache.index_select(0, chunk.slots).permute(1, 0, 2)
    keys = torch.arange(len(chunk.slots), device=q.device)
    tile = max(LEAST_ROWS, MOST_SCORES // (heads * len(chunk.slots)))
    for first in range(chunk.start, chunk.stop, tile):
        last = min(first + tile, chunk.stop)
        queries = q[first:last].view(last - first, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3)
        positions = chunk.positions[first - chunk.start : last - chunk.start, None]
        seen = _seen(positions, keys, window).repeat(heads // kv_heads, 1)
        result = _softmax_product(queries.flatten(1, 2), k, v, seen).view(kv_heads, -1, last - first, dim)
        out[first:last] = result.permute(2, 0, 1, 3).reshape(last - first, heads, dim).to(out.dtype)


def _seen(positions: Tensor, keys: Tensor, window: int | None) -> Tensor:
    seen = keys <= positions
    return seen if window is None else seen & (keys > positions - window)


def _softmax_product(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Return softmax(q kᵀ / √D where seen) v in float32; q [..., M, D], k and v [..., L, D], seen [..., M, L]."""
    rows = q.shape[-2]
    q = q.float() * q.shape[-1] ** -0.5
    if rows < LEAST_ROWS:
        q = torch.nn.functional.pad(q, (0, 0, 0, LEAST_ROWS - rows))
    scores = torch.matmul(q, k.float().transpose(-1, -2))[..., :rows, :]
    scores = scores.masked_fill(~seen, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp_()
    if rows < LEAST_ROWS:
        weights = torch.nn.functional.pad(weights, (0, 0, 0, LEAST_ROWS - rows))
    sums = torch.matmul(weights, torch.nn.functional.pad(v.float(), (0, 1), value=1.0))[..., :rows, :]
    return sums[..., :-1] / sums[..., -1:]
