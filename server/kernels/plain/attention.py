"""Paged attention in plain torch, over decode rows in padded batches and prompt chunks one by one.

What a token gets on a CPU is the same to the bit whether its prompt came whole or in chunks, alone or in a batch:
matmuls have enough rows that their number doesn't show; keys are summed in segments of a fixed length that begin at
fixed positions, one segment after the other; the softmax's denominator is a column of the same product; and what is
masked adds exact zeros, so that neither the padding of a context nor the keys after a token show.

A masked value still meets a weight of 0 in a product, and 0 × NaN is NaN. So what a row gathers past its context is a
copy of its own last key and value: nothing that another sequence wrote is read, whatever it holds.

A GPU, on which no bits are promised and every op is a launch, computes all this in torch's own attention kernel, where
that takes the type (``can_fuse``): then a plan's masks are of that type, 0 for keys that a query sees and −inf for the
others.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from manylora.server.kernels.plain.invariance import MATMUL_LIMITS
from manylora.server.kernels.plain.kv_cache import CachedRows
from manylora.server.kernels.step import AttentionMetadata, Ints

# Scores and sums are float32 in every dtype.
_LIMITS = MATMUL_LIMITS[torch.float32]
SEGMENT = _LIMITS.most_depth
"""Keys that one product sums."""
PADDING = 64
"""Contexts are padded to a multiple of this. It divides SEGMENT."""
# Scores of one matmul, in elements, about: a tile that leaves the cache is slower.
TILE_SCORES = 1 << 20
SCRATCH_BYTES = 16 << 20
"""Float32 copies of keys and values that attention makes at a time, unless those of one sequence and KV head are more:
no pool counts them. Copies that leave the cache make long contexts several times slower."""
CUDA_SCRATCH_BYTES = 256 << 20
"""The same on CUDA, where each part costs launches."""
MASK_BYTES = 3
"""Of a query and a key in the masks of fused attention: what is hidden, and what is added."""
FUSED = {"cuda": [SDPBackend.EFFICIENT_ATTENTION], "cpu": [SDPBackend.MATH]}
"""Of torch's kernels the one that takes any mask; on a GPU it keeps no scores. Cards that lack it are found at load."""


Masks: TypeAlias = Mapping[int | None, Tensor]
"""By sliding window: bool, True for keys that a query doesn't see; or, where attention is fused, what is added to its
scores."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Sequences with one query each whose contexts are padded to the same length L."""

    tokens: Tensor | None
    """int64 [n]: where their queries are among the step's tokens; None: they are the step's first n."""
    slots: Tensor
    """int64 [n · L]: KV slots of their contexts, in order; padding repeats a context's last slot and is masked."""
    length: int
    masks: Masks
    """[n, 1, L]"""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A sequence with several queries."""

    start: int
    stop: int
    slots: Tensor
    """int64 [L]"""
    position: int
    """Of the first query."""
    masks: Masks
    """[Q, L], where attention is fused; else none, they are made tile by tile."""


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Index tensors of a step, made once and used by every layer."""

    slots: Tensor
    groups: tuple[RowGroup, ...]
    chunks: tuple[Chunk, ...]


def can_fuse(dtype: torch.dtype, kv_dtype: torch.dtype) -> bool:
    """Whether attention can be one kernel of torch's: in 16 bits."""
    return dtype.itemsize == 2 and kv_dtype == dtype


def plan_attention(
    metadata: AttentionMetadata,
    block_size: int,
    windows: Collection[int | None],
    device: torch.device,
    fused: torch.dtype | None = None,
) -> AttentionPlan:
    """Turn a step's rows into index tensors for layers with the given sliding windows.

    ``fused``: the type of q, keys and values, where torch's own kernel is to attend.
    """
    decodes: dict[int, list[int]] = defaultdict(list)
    chunks = []
    tables, starts = index_tensor(metadata.block_tables, device), metadata.query_start.tolist()
    for row, context in enumerate(metadata.context_lens.tolist()):
        if starts[row + 1] - starts[row] == 1:
            # Rows within a factor of two share a group, so that padding at most doubles its keys.
            decodes[max(PADDING, context - 1).bit_length()].append(row)
        elif starts[row + 1] > starts[row]:
            last = torch.full((1,), context - 1, device=device)
            slots = _slots(tables[row : row + 1], last, _padded(context), block_size)
            position = context - (starts[row + 1] - starts[row])
            queries = torch.arange(position, context, device=device)[:, None]
            bounded = len(queries) * len(slots) * MASK_BYTES * len(windows) <= CUDA_SCRATCH_BYTES
            masks = {} if fused is None or not bounded else make_masks(queries, len(slots), windows, fused)
            chunks.append(Chunk(starts[row], starts[row + 1], slots, position, masks))
    groups = []
    for rows in decodes.values():
        length, first = _padded(int(metadata.context_lens[rows].max())), metadata.query_start[rows]
        tokens, positions = (index_tensor(each, device) for each in (first, metadata.positions[first]))
        own = tables[torch.tensor(rows, device=device)]
        groups.append(row_group(tokens, positions, own, length, block_size, windows, fused))
    return AttentionPlan(index_tensor(metadata.slots, device), tuple(groups), tuple(chunks))


def index_tensor(values: Ints, device: torch.device) -> Tensor:
    """Return indices on ``device`` in the type that torch's ops want: int64."""
    return torch.from_numpy(values).to(device, torch.int64)


def row_group(
    tokens: Tensor | None,
    positions: Tensor,
    tables: Tensor,
    length: int,
    block_size: int,
    windows: Collection[int | None],
    fused: torch.dtype | None,
) -> RowGroup:
    """Return rows with one query each: ``positions`` [n], ``tables`` [n, blocks], contexts padded to ``length``."""
    masks = make_masks(positions[:, None, None], length, windows, fused)
    return RowGroup(tokens, _slots(tables, positions, length, block_size), length, masks)


def make_masks(
    positions: Tensor, length: int, windows: Collection[int | None], fused: torch.dtype | None
) -> Masks:
    """Return masks over the first ``length`` keys for queries at ``positions``, [..., 1]."""
    keys = torch.arange(length, device=positions.device)
    masks = {window: _hidden(positions, keys, window) for window in windows}
    if fused is None:
        return masks
    return {
        window: torch.zeros(hidden.shape, dtype=fused, device=hidden.device).masked_fill_(hidden, -torch.inf)
        for window, hidden in masks.items()
    }


def _padded(context: int) -> int:
    return -(-context // PADDING) * PADDING


def _slots(tables: Tensor, last: Tensor, length: int, block_size: int) -> Tensor:
    """Return the slots of the first ``length`` positions of each table [n, blocks], row after row: int64 [n · length].

    ``last`` [n] is the last position of each context; the positions after it have its slot.
    """
    positions = torch.minimum(torch.arange(length, device=tables.device), last[:, None])
    slots = tables.gather(1, positions // block_size) * block_size + positions % block_size
    return slots.view(-1)


def _hidden(positions: Tensor, keys: Tensor, window: int | None) -> Tensor:
    hidden = keys > positions
    return hidden if window is None else hidden | (keys <= positions - window)


def attend(
    q: Tensor, k_cache: CachedRows, v_cache: CachedRows, plan: AttentionPlan, window: int | None, out: Tensor
) -> None:
    """Fill ``out`` [T, H, D] at the plan's tokens; rows of no sequence are left alone. Shapes as in reference.py."""
    for group in plan.groups:
        _attend_group(q, k_cache, v_cache, group, window, out)
    for chunk in plan.chunks:
        if chunk.masks:
            _attend_fused_chunk(q, k_cache, v_cache, chunk, chunk.masks[window], out)
        else:
            _attend_chunk(q, k_cache, v_cache, chunk, window, out)


def _attend_group(
    q: Tensor, k_cache: CachedRows, v_cache: CachedRows, group: RowGroup, window: int | None, out: Tensor
) -> None:
    heads, dim = q.shape[1:]
    kv_heads, shared = k_cache.data.shape[1], heads // k_cache.data.shape[1]
    slots, out = group.slots.view(-1, group.length), out.view(-1, kv_heads, shared, dim)
    mask = group.masks[window]
    of_rows = _rows_by_score if mask.dtype is torch.bool else _rows_fused
    for rows, kept in _pieces(len(slots), kv_heads, group.length, dim, q.is_cuda):
        tokens = None if group.tokens is None else group.tokens[rows]
        queries = q[rows] if tokens is None else q.index_select(0, tokens)
        queries = queries.view(len(queries), kv_heads, shared, dim)[:, kept]
        caches = k_cache.of_heads(kept), v_cache.of_heads(kept)
        result = of_rows(queries, *caches, slots[rows], mask[rows]).to(out.dtype)
        if tokens is None:
            out[rows, kept] = result
        else:
            out[:, kept].index_copy_(0, tokens, result)


def _rows_by_score(
    q: Tensor, k_cache: CachedRows, v_cache: CachedRows, slots: Tensor, hidden: Tensor
) -> Tensor:
    """Return what q [n, KV heads, shared, D] attends to at ``slots`` [n, L], in float32."""
    count, kv_heads, shared, dim = q.shape
    k, v = _keys_and_values(k_cache, v_cache, slots.reshape(-1), count)
    # Rows past the heads that share a KV head are padding.
    least = max(shared, _LIMITS.least_rows)
    queries = q.new_zeros(count, kv_heads, least, dim, dtype=torch.float32)
    queries[:, :, :shared] = q
    scores = torch.bmm(queries.flatten(0, 1).mul_(dim**-0.5), k.transpose(1, 2))
    scores.view(count, -1, slots.shape[1]).masked_fill_(hidden, -torch.inf)
    return _softmax_product(scores, v)[:, :shared].view(count, -1, shared, dim)


def _rows_fused(q: Tensor, k_cache: CachedRows, v_cache: CachedRows, slots: Tensor, mask: Tensor) -> Tensor:
    """As _rows_by_score, in q's type; the heads that share keys are queries beside each other."""
    count, kv_heads, shared, dim = q.shape
    k, v = (
        cache.gather(slots.reshape(-1)).view(count, -1, kv_heads, dim).transpose(1, 2)
        for cache in (k_cache, v_cache)
    )
    with sdpa_kernel(FUSED[q.device.type]):
        return F.scaled_dot_product_attention(q, k, v, mask[:, None].expand(-1, kv_heads, shared, -1))


def _attend_fused_chunk(
    q: Tensor, k_cache: CachedRows, v_cache: CachedRows, chunk: Chunk, mask: Tensor, out: Tensor
) -> None:
    """Attend for a sequence with several queries: KV heads as the batch, the heads that share one as its heads."""
    kv_heads = k_cache.data.shape[1]
    own = slice(chunk.start, chunk.stop)
    queries = q[own].view(chunk.stop - chunk.start, kv_heads, -1, q.shape[2]).permute(1, 2, 0, 3)
    k, v = (
        cache.gather(chunk.slots).transpose(0, 1)[:, None].expand(-1, queries.shape[1], -1, -1)
        for cache in (k_cache, v_cache)
    )
    with sdpa_kernel(FUSED[q.device.type]):
        result = F.scaled_dot_product_attention(queries, k, v, mask.expand(*queries.shape[:2], -1, -1))
    out[own] = result.permute(2, 0, 1, 3).flatten(1, 2)


def _attend_chunk(
    q: Tensor, k_cache: CachedRows, v_cache: CachedRows, chunk: Chunk, window: int | None, out: Tensor
) -> None:
    kv_heads, dim = k_cache.data.shape[1:]
    q, out = q.view(q.shape[0], kv_heads, -1, dim), out.view(out.shape[0], kv_heads, -1, dim)
    for _, kept in _pieces(1, kv_heads, chunk.slots.shape[0], dim, q.is_cuda):
        _attend_heads(q[:, kept], k_cache.of_heads(kept), v_cache.of_heads(kept), chunk, window, out[:, kept])


def _attend_heads(
    q: Tensor, k_cache: CachedRows, v_cache: CachedRows, chunk: Chunk, window: int | None, out: Tensor
) -> None:
    """As _attend_chunk, for a part of the KV heads: q and out [T, part, heads of each, D], caches [slots, part, D]."""
    kv_heads, shared, dim = q.shape[1:]
    heads, length = kv_heads * shared, chunk.slots.shape[0]
    k, v = _keys_and_values(k_cache, v_cache, chunk.slots, 1)
    keys = torch.arange(length, device=q.device)
    tile = max(_LIMITS.least_rows, TILE_SCORES // (heads * length))
    for first in range(chunk.start, chunk.stop, tile):
        # A short last tile is computed with rows of padding.
        last = min(first + tile, chunk.stop)
        rows = max(last - first, _LIMITS.least_rows)
        queries = q.new_zeros(kv_heads, shared, rows, dim, dtype=torch.float32)
        queries[:, :, : last - first] = q[first:last].permute(1, 2, 0, 3)
        position = chunk.position + first - chunk.start
        seen = _seen_keys(position, position + last - first, length, window)
        scores = torch.bmm(queries.flatten(1, 2).mul_(dim**-0.5), k[:, seen].transpose(1, 2))
        positions = torch.arange(position, position + rows, device=q.device)[:, None]
        hidden = _hidden(positions, keys[seen], window)
        hidden[last - first :] = False
        scores.view(heads, rows, -1).masked_fill_(hidden, -torch.inf)
        result = _softmax_product(scores, v[:, seen]).view(kv_heads, shared, rows, dim)[:, :, : last - first]
        out[first:last] = result.permute(2, 0, 1, 3).to(out.dtype)


def _pieces(count: int, kv_heads: int, length: int, dim: int, on_cuda: bool) -> Iterator[tuple[slice, slice]]:
    """Yield (rows, KV heads) whose copies fit the scratch: many rows with all heads, or one with some of them."""
    each = length * (2 * dim + 1) * torch.float32.itemsize
    fitting = max(1, (CUDA_SCRATCH_BYTES if on_cuda else SCRATCH_BYTES) // each)
    rows, heads = max(1, fitting // kv_heads), min(fitting, kv_heads)
    for row in range(0, count, rows):
        for head in range(0, kv_heads, heads):
            yield slice(row, min(row + rows, count)), slice(head, min(head + heads, kv_heads))


def _seen_keys(position: int, end: int, length: int, window: int | None) -> slice:
    """Return the keys that queries from ``position`` to before ``end`` see, widened to segments and padding."""
    first = 0 if window is None else max(0, position - window + 1) // SEGMENT * SEGMENT
    return slice(first, min(_padded(end), length))


def _keys_and_values(
    k_cache: CachedRows, v_cache: CachedRows, slots: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Return float32 k [count · KV heads, L, D] and v [count · KV heads, L, D + 1] whose last column is ones."""
    kv_heads, dim = k_cache.data.shape[1:]
    length = slots.shape[0] // count
    k = torch.empty(count, kv_heads, length, dim, dtype=torch.float32, device=slots.device)
    v = torch.empty(count, kv_heads, length, dim + 1, dtype=torch.float32, device=slots.device)
    for target, cache in ((k, k_cache), (v[..., :dim], v_cache)):
        gathered = cache.gather(slots).view(count, length, kv_heads, dim)
        target.copy_(gathered.transpose(1, 2))
    v[..., dim] = 1.0
    return k.flatten(0, 1), v.flatten(0, 1)


def _softmax_product(scores: Tensor, v: Tensor) -> Tensor:
    """Return softmax(scores) v, float32 [b, M, D]; scores [b, M, L] are overwritten, v [b, L, D + 1]."""
    weights = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    sums = torch.bmm(weights[..., :SEGMENT], v[:, :SEGMENT])
    for first in range(SEGMENT, weights.shape[-1], SEGMENT):
        segment = slice(first, first + SEGMENT)
        sums.baddbmm_(weights[..., segment], v[:, segment])
    return sums[..., :-1] / sums[..., -1:]
