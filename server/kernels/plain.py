"""The backend that runs everywhere torch does, CPU and CUDA: reference.py's ops composed from torch's own matmuls.

A row's bits don't depend on who shares its batch nor on how its prompt was chunked: matmuls stay within the sizes
of manylora.server.kernels.invariance, and tests/server/kernels/test_invariance.py holds it. CUDA gives that up, since
cuBLAS picks kernels by shape.
"""

import logging
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from manylora.quant.nf4 import Nf4Tensor
from manylora.server.kernels.attention import AttentionPlan, attend, plan_attention
from manylora.server.kernels.backend import AttentionWeights, WeightSource
from manylora.server.kernels.invariance import MATMUL_LIMITS
from manylora.server.kernels.linear import (
    DenseLinear,
    DequantizedLinear,
    PlainLinear,
    can_fuse_nf4,
    fuse_nf4,
    fused_nf4_reason,
)
from manylora.server.kernels.lora import LayerLora, LoraMetadata, build_lora_metadata
from manylora.server.kernels.metadata import AttentionMetadata, LoraSpan

log = logging.getLogger(__name__)


class PlainBackend:
    """Plain torch on one device in one dtype. Stateless but for its choices, so any number of steps may use it."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self.least_rows = MATMUL_LIMITS[dtype].least_rows
        reason = fused_nf4_reason(device, dtype)
        self._fuses_nf4 = reason is None
        self.nf4_kernel = (
            "bitsandbytes' fused kernel" if reason is None else f"dequantise + matmul ({reason})"
        )
        log.info("NF4 matmul: %s", self.nf4_kernel)

    def prepare(self, parts: Sequence[WeightSource], bias: Tensor | None) -> PlainLinear:
        """Stack ``parts`` along out_features in the layout that is fastest here; see Backend."""
        bias = None if bias is None else bias.to(self.device, self.dtype)
        if self._fuses_nf4 and can_fuse_nf4(parts):
            return fuse_nf4([part for part in parts if isinstance(part, Nf4Tensor)], bias)
        if any(part.is_quantized for part in parts):
            return DequantizedLinear(tuple(part.to(self.device) for part in parts), bias, self.dtype)
        matrices = [part.dequantize(self.dtype).to(self.device) for part in parts]
        return DenseLinear(matrices[0] if len(matrices) == 1 else torch.cat(matrices), bias)

    def plan_attention(
        self, metadata: AttentionMetadata, block_size: int, windows: Collection[int | None]
    ) -> AttentionPlan:
        """Make a step's index tensors, once for all layers."""
        return plan_attention(metadata, block_size, windows)

    def build_lora(self, spans: Sequence[LoraSpan], num_tokens: int) -> LoraMetadata | None:
        """Make a step's LoRA metadata, once for all layers; None when every row is base."""
        rows = max(num_tokens, self.least_rows)
        return build_lora_metadata(spans, rows, self.device, self.dtype)

    def embed(self, token_ids: Tensor, embedding: Tensor) -> Tensor:
        """Return [max(T, least_rows), hidden]: rows past T are padding that every op carries along."""
        missing = self.least_rows - token_ids.shape[0]
        return F.embedding(F.pad(token_ids, (0, missing)) if missing > 0 else token_ids, embedding)

    def attn_in(
        self, x: Tensor, norm: Tensor, eps: float, qkv: PlainLinear, lora: LayerLora | None
    ) -> Tensor:
        """See Backend.attn_in. Widths of q, k and v are those of the adapters' B, so none need be given."""
        h = rms_norm(x, norm, eps)
        y = qkv(h)
        if lora is not None:
            _add_slices(lora, ("q_proj", "k_proj", "v_proj"), h, y)
        return y

    def attend(
        self,
        qkv: Tensor,
        weights: AttentionWeights,
        rope: tuple[Tensor, Tensor],
        caches: tuple[Tensor, Tensor],
        plan: AttentionPlan,
    ) -> Tensor:
        """See Backend.attend."""
        k_cache, v_cache = caches
        kv_heads, dim = k_cache.shape[1:]
        count = plan.positions.shape[0]
        heads = qkv.shape[1] // dim - 2 * kv_heads
        q, k, v = torch.split(qkv[:count].view(count, -1, dim), [heads, kv_heads, kv_heads], dim=1)
        if weights.q_norm is not None and weights.k_norm is not None:
            q, k = rms_norm(q, weights.q_norm, weights.eps), rms_norm(k, weights.k_norm, weights.eps)
        cos, sin = rope
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k_cache.index_copy_(0, plan.slots, k)
        v_cache.index_copy_(0, plan.slots, v)
        out = qkv.new_zeros(qkv.shape[0], heads, dim)
        attend(q, k_cache, v_cache, plan, weights.window, out)
        return out.flatten(1)

    def attn_out(self, o: Tensor, weight: PlainLinear, lora: LayerLora | None, x: Tensor) -> Tensor:
        """See Backend.attn_out."""
        return _project(o, weight, "o_proj", lora).add_(x)

    def mlp_in(
        self, x: Tensor, norm: Tensor, eps: float, gate_up: PlainLinear, lora: LayerLora | None
    ) -> Tensor:
        """See Backend.mlp_in."""
        h = rms_norm(x, norm, eps)
        y = gate_up(h)
        if lora is not None:
            _add_slices(lora, ("gate_proj", "up_proj"), h, y)
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def mlp_out(self, h: Tensor, weight: PlainLinear, lora: LayerLora | None, x: Tensor) -> Tensor:
        """See Backend.mlp_out."""
        return _project(h, weight, "down_proj", lora).add_(x)

    def head(self, x: Tensor, rows: Tensor, norm: Tensor, eps: float, weight: PlainLinear) -> Tensor:
        """See Backend.head."""
        count = rows.shape[0]
        if count < self.least_rows:
            rows = F.pad(rows, (0, self.least_rows - count))
        return weight(rms_norm(x[rows], norm, eps))[:count].float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """reference.rms_norm, computed in float32 and returned in x's dtype; NaN where x² overflows."""
    wide = x.float()
    power = wide.pow(2).mean(-1, keepdim=True)
    # 1 / √∞ would make zeros of a row that overflowed, and they would pass for an answer.
    scale = torch.rsqrt(power + eps) + power * 0
    return (wide * scale).to(x.dtype) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """reference.rope, computed in float32 and returned in x's dtype; cos and sin [T, 1, D]."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1).mul_(sin).addcmul_(wide, cos).to(x.dtype)


def _project(x: Tensor, weight: PlainLinear, module: str, lora: LayerLora | None) -> Tensor:
    y = weight(x)
    if lora is not None:
        lora.add(module, x, y)
    return y


def _add_slices(lora: LayerLora, modules: tuple[str, ...], x: Tensor, fused: Tensor) -> None:
    """Add each module's delta to its columns of a fused projection."""
    first = 0
    for module in modules:
        last = first + lora.buffers[module][1].shape[1]
        lora.add(module, x, fused[:, first:last])
        first = last
