"""What native code does between the q, k, v projection and attention, against reference.py."""

import ctypes
import math

import pytest
import torch
from torch import Tensor

from manylora.server.kernels.cpu import abi
from manylora.server.kernels.cpu.library import Kernels
from manylora.server.kernels.reference import rms_norm, rope
from tests.server.kernels.cpu.attention_case import Heads, packed

HEADS = (Heads(4, 2, 16), Heads(14, 2, 64), Heads(2, 1, 24), Heads(3, 3, 128))
POSITIONS = torch.tensor([3, 0, 99, 5, 6], dtype=torch.int32)
SLOTS = torch.tensor([5, 4, 30, 31, 7], dtype=torch.int32)
BLOCK = 8
EPS = 1e-6


class Tokens:
    """Five tokens of the second of two layers, and a cache of 40 slots."""

    def __init__(self, heads: Heads, *, normed: bool) -> None:
        torch.manual_seed(heads.dim)
        self.heads = heads
        self.qkv = torch.randn(5, (heads.q + 2 * heads.kv) * heads.dim)
        angles = torch.rand(100, heads.dim // 2) * 6
        self.cos, self.sin = (torch.cat([table, table], dim=1) for table in (angles.cos(), angles.sin()))
        self.norms = torch.rand(2, heads.dim) + 0.5 if normed else None
        self.kv = torch.full((2, 2, 40, heads.kv, heads.dim), 7.0, dtype=torch.bfloat16)

    def run(self, kernels: Kernels, codes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return q [5, H, D] and the tokens' flags; the cache is written, or ``codes``, which is one in 8 bits."""
        qkv, finite = self.qkv.clone(), torch.ones(5, dtype=torch.uint8)
        layers = (abi.Layer * 2)()
        if self.norms is not None:
            layers[1].q_norm, layers[1].k_norm = self.norms[0].data_ptr(), self.norms[1].data_ptr()
        model = abi.Model(
            layers=2,
            heads=self.heads.q,
            kv_heads=self.heads.kv,
            head_dim=self.heads.dim,
            positions=100,
            eps=EPS,
            cos=self.cos.data_ptr(),
            sin=self.sin.data_ptr(),
            layer=ctypes.addressof(layers),
        )
        shape = (2, 2, -1, BLOCK, self.heads.kv, self.heads.dim)
        halves = self.kv.view(shape) if codes is None else codes
        form = abi.KV_BF16 if codes is None else abi.KV_INT8
        data = halves.movedim(2, 0).contiguous()  # a block's halves of all layers lie together
        kv = abi.KV(data=data.data_ptr(), slots=40, block_size=BLOCK, form=form)
        step = abi.Step(
            tokens=5, positions=POSITIONS.data_ptr(), slots=SLOTS.data_ptr(), finite=finite.data_ptr()
        )
        call = abi.Call(
            model=ctypes.addressof(model),
            kv=ctypes.addressof(kv),
            step=ctypes.addressof(step),
            layer=1,
            qkv=qkv.data_ptr(),
        )
        kernels.call("rope_rows", ctypes.addressof(call))
        halves.copy_(data.movedim(0, 2))
        q = qkv[:, : self.heads.q * self.heads.dim].view(5, self.heads.q, self.heads.dim)
        return q, finite

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [5, heads, D] in float32."""
        heads = self.heads
        q, k, v = torch.split(self.qkv.view(5, -1, heads.dim), [heads.q, heads.kv, heads.kv], dim=1)
        if self.norms is not None:
            q, k = rms_norm(q, self.norms[0], EPS), rms_norm(k, self.norms[1], EPS)
        cos, sin = self.cos[POSITIONS.long()], self.sin[POSITIONS.long()]
        return rope(q, cos, sin), rope(k, cos, sin), v


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("normed", [False, True])
def test_q_and_k_are_rotated_and_k_and_v_written(kernels: Kernels, heads: Heads, normed: bool) -> None:
    tokens = Tokens(heads, normed=normed)
    found, finite = tokens.run(kernels)
    q, k, v = tokens.expected()
    torch.testing.assert_close(found, q, rtol=3e-6, atol=3e-6)
    # Rounded once: half a unit of bfloat16's last place, and what float32 differs by.
    written = tokens.kv[1, :, SLOTS.long()].float()
    torch.testing.assert_close(written[0], k, rtol=2**-8, atol=3e-6)
    assert torch.equal(written[1], v.bfloat16().float())
    assert finite.tolist() == [1] * 5


def test_only_the_tokens_own_slots_of_their_layer_are_written(kernels: Kernels) -> None:
    tokens = Tokens(HEADS[1], normed=False)
    tokens.run(kernels)
    others = torch.ones(40, dtype=torch.bool)
    others[SLOTS.long()] = False
    assert (tokens.kv[0] == 7.0).all()
    assert (tokens.kv[1, :, others] == 7.0).all()


@pytest.mark.parametrize("heads", HEADS)
def test_keys_and_values_are_brought_to_8_bits_as_plain_torch_does(kernels: Kernels, heads: Heads) -> None:
    tokens = Tokens(heads, normed=False)
    tokens.cos.fill_(1.0)
    tokens.sin.fill_(0.0)
    own = tokens.qkv.view(5, -1, heads.dim)[:, heads.q :]
    own[0, 0], own[1, 1], own[2, 0, -3:] = 0.0, own[1, 1] * 1e-38, torch.tensor([3.3e38, -3.3e38, 1.0])
    own[3, :, :4] = torch.tensor([127.0, 0.5, 1.5, -2.5])  # ties, where it is the largest
    own[3, :, 4:].clamp_(-2, 2)
    own[4, 0, 2 :: heads.dim // 2] = math.nan  # it is rotated into its other half
    own[4, -1, 5], own[4, -1, -1] = -math.inf, 7.0
    before = torch.randn(2, 2, 40, heads.kv, heads.dim)
    cache = torch.stack([packed(layer, BLOCK) for layer in before])
    _, finite = tokens.run(kernels, cache)
    after = before.clone()
    after[1, :, SLOTS.long()] = own.view(5, 2, heads.kv, heads.dim).transpose(0, 1)
    assert torch.equal(cache, torch.stack([packed(layer, BLOCK) for layer in after]))
    assert finite.tolist() == [1, 1, 1, 1, 0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 3.4e38])
@pytest.mark.parametrize("place", [0, -1])
def test_a_token_is_flagged_whose_keys_or_values_are_not_finite_in_8_bits(
    kernels: Kernels, bad: float, place: int
) -> None:
    heads = HEADS[2]
    tokens = Tokens(heads, normed=False)
    tokens.qkv[2, heads.q * heads.dim :][place] = bad
    _, finite = tokens.run(kernels, packed(torch.zeros(2, 40, heads.kv, heads.dim), BLOCK).repeat(2, 1, 1, 1))
    assert finite.tolist() == [1, 1, int(math.isfinite(bad)), 1, 1]


@pytest.mark.parametrize("heads", HEADS)
def test_a_token_is_flagged_whose_keys_or_values_are_not_finite(kernels: Kernels, heads: Heads) -> None:
    tokens = Tokens(heads, normed=False)
    keys, values = heads.q * heads.dim, (heads.q + heads.kv) * heads.dim
    tokens.qkv[0, values + 1] = math.nan
    tokens.qkv[2, keys + 3] = math.inf
    tokens.qkv[3, 0] = math.nan  # a query: it is read by nobody else
    tokens.qkv[4, -1] = 3.4e38  # finite as float32, infinite as bfloat16
    _, finite = tokens.run(kernels)
    assert finite.tolist() == [0, 1, 0, 1, 0]
