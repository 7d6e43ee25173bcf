"""A mixed step of attention for the native kernels, and the structures that tell them of it."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from manylora.server.kernels.cpu import abi
from manylora.server.kernels.cpu.library import Kernels
from manylora.server.kernels.plain.kv_int8 import dequantize_kv, groups_of, quantize_kv
from manylora.server.kernels.reference import paged_attention
from manylora.server.kernels.step import AttentionMetadata
from tests.server.model.steps import ints

Row = tuple[int, int, int]
"""A sequence: the seed of its numbers, its context, how many of its last tokens are this step's."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Of a model."""

    q: int
    kv: int
    dim: int


@dataclass(frozen=True, slots=True)
class Case:
    """Numbers of a sequence are drawn from its own seed, so that it is the same in any company."""

    rows: Sequence[Row]
    heads: Heads
    block_size: int
    tables: Tensor
    kv: Tensor
    """bfloat16 [2, slots, KV heads, D]"""
    form: int
    """abi.KV_BF16 or KV_INT8."""
    q: Tensor
    """float32 [T, H · D]"""

    @property
    def starts(self) -> list[int]:
        """Prefix sums of the rows' queries."""
        return [0, *torch.tensor([queries for _, _, queries in self.rows]).cumsum(0).tolist()]

    def own_slots(self, row: int) -> Tensor:
        """Slots of a row's context, in order."""
        index = torch.arange(self.rows[row][1])
        return self.tables[row].long()[index // self.block_size] * self.block_size + index % self.block_size

    def expected(self, window: int | None) -> Tensor:
        """What reference.py makes of it."""
        positions = ints([each for _, context, n in self.rows for each in range(context - n, context)])
        contexts = ints([context for _, context, _ in self.rows])
        metadata = AttentionMetadata(positions, positions, ints(self.starts), contexts, self.tables.numpy())
        q = self.q.view(-1, self.heads.q, self.heads.dim)
        kv = self.kv if self.form == abi.KV_BF16 else dequantize_kv(*quantize_kv(self.kv))
        return paged_attention(q, kv[0], kv[1], metadata, self.block_size, window).flatten(1)


@cache
def expected(rows: tuple[Row, ...], heads: Heads, window: int | None, form: int) -> Tensor:
    """What reference.py makes of make_case of these, whatever the blocks."""
    return make_case(rows, heads, 16, form).expected(window)


def make_case(
    rows: Sequence[Row], heads: Heads, block_size: int, form: int, *, garbage: float = torch.nan
) -> Case:
    """Blocks are dealt out in random order; what no row owns holds ``garbage``."""
    needed = [-(-context // block_size) for _, context, _ in rows]
    order = (torch.randperm(sum(needed) + 3, generator=torch.Generator().manual_seed(len(rows))) + 1).tolist()
    tables = torch.zeros(len(rows), max(needed) + 2, dtype=torch.int32)
    kv = torch.full((2, (len(order) + 1) * block_size, heads.kv, heads.dim), garbage, dtype=torch.bfloat16)
    for row, blocks in enumerate(needed):
        tables[row, :blocks] = torch.tensor([order.pop() for _ in range(blocks)])
    q = torch.empty(sum(queries for _, _, queries in rows), heads.q * heads.dim)
    case = Case(rows, heads, block_size, tables, kv, form, q)
    for row, (seed, context, queries) in enumerate(rows):
        draw = torch.Generator().manual_seed(seed)
        # By token, so that a longer context of the same seed begins with the same numbers.
        drawn = torch.randn(context, heads.q + 2 * heads.kv, heads.dim, generator=draw)
        q[case.starts[row] : case.starts[row + 1]] = drawn[context - queries :, : heads.q].flatten(1)
        kv[:, case.own_slots(row)] = (
            drawn[:, heads.q :].view(context, 2, heads.kv, heads.dim).transpose(0, 1).bfloat16()
        )
    return case


def packed(kv: Tensor, block_size: int) -> Tensor:
    """Lay keys and values [2, slots, KV heads, D] out as an int8 cache does: uint8 [2, blocks, bytes of one]."""
    parts = quantize_kv(kv)
    codes, scales = (part.reshape(len(kv), -1, block_size, *part.shape[-2:]) for part in parts)
    blocks = torch.zeros(
        *codes.shape[:-3], block_bytes(kv.shape[-2], kv.shape[-1], block_size), dtype=torch.uint8
    )
    # Keys lie [KV heads, D, slots of a block], values [KV heads, slots, D], scales [KV heads, groups, slots].
    keys, values = codes.movedim(-3, -1)[0], codes.transpose(-3, -2)[1]
    own = torch.stack((keys.flatten(-3), values.flatten(-3))).view(torch.uint8)
    steps = scales.movedim(-3, -1).flatten(-3).contiguous().view(torch.uint8)
    blocks[..., : own.shape[-1]] = own
    blocks[..., own.shape[-1] : own.shape[-1] + steps.shape[-1]] = steps
    return blocks


def block_bytes(kv_heads: int, dim: int, block_size: int) -> int:
    """Bytes of an int8 block: whole lines of 64."""
    return -(-block_size * kv_heads * (dim + 2 * groups_of(dim)) // 64) * 64


def attend(kernels: Kernels, case: Case, window: int | None = None) -> Tensor:
    """Return o [T, H · D] as the kernels compute it."""
    heads, starts = case.heads, torch.tensor(case.starts, dtype=torch.int32)
    contexts = torch.tensor([context for _, context, _ in case.rows], dtype=torch.int32)
    tokens = len(case.q)
    # Attention reads k and v from the cache.
    qkv = torch.cat((case.q, torch.full((tokens, 2 * heads.kv * heads.dim), torch.nan)), dim=1)
    o = torch.full_like(case.q, torch.nan)
    layer = abi.Layer(window=window or 0)
    model = abi.Model(
        layers=1, heads=heads.q, kv_heads=heads.kv, head_dim=heads.dim, layer=ctypes.addressof(layer)
    )
    halves = case.kv.view(2, -1, case.block_size, heads.kv, heads.dim)
    if case.form != abi.KV_BF16:
        halves = packed(case.kv, case.block_size)
    data = halves.transpose(0, 1).contiguous()  # a block's keys and values lie together
    kv = abi.KV(data=data.data_ptr(), slots=case.kv.shape[1], block_size=case.block_size, form=case.form)
    step = abi.Step(
        tokens=tokens,
        sequences=len(case.rows),
        table_width=case.tables.shape[1],
        query_start=starts.data_ptr(),
        context_lens=contexts.data_ptr(),
        block_tables=case.tables.data_ptr(),
    )
    call = abi.Call(
        model=ctypes.addressof(model),
        kv=ctypes.addressof(kv),
        step=ctypes.addressof(step),
        qkv=qkv.data_ptr(),
        o=o.data_ptr(),
    )
    kernels.call("attention_rows", ctypes.addressof(call))
    return o
