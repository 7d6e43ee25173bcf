"""The backend that runs everywhere torch does, CPU and CUDA: reference.py's ops composed from torch's own matmuls.

A row's bits don't depend on who shares its batch nor on how its prompt was chunked: matmuls stay within the sizes of
invariance.py, and tests/server/kernels/plain/test_invariance.py holds it. So the rows that an op is given are padded to
``least_rows``. CUDA gives that up, since cuBLAS picks kernels by shape.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from manylora.quant.dense import DenseTensor
from manylora.quant.int8 import Int8Tensor, quantize_int8
from manylora.quant.nf4 import Nf4Tensor, quantize_nf4
from manylora.server.kernels.backend import KVCache, RankArena, WeightSource, compose
from manylora.server.kernels.composed import Composed, collect_composed, launch_composed
from manylora.server.kernels.output import StepOutput
from manylora.server.kernels.owned import foreign, own
from manylora.server.kernels.plain.arena import PlainArena, bytes_per_row
from manylora.server.kernels.plain.attention import AttentionPlan, attend, index_tensor, plan_attention
from manylora.server.kernels.plain.invariance import MATMUL_LIMITS
from manylora.server.kernels.plain.kv_cache import PlainKVCache, bytes_per_block
from manylora.server.kernels.plain.linear import (
    DenseLinear,
    DequantizedLinear,
    PlainLinear,
    can_fuse_nf4,
    fuse_nf4,
    fused_nf4_reason,
)
from manylora.server.kernels.plain.lora import LoraMetadata, build_lora_metadata
from manylora.server.kernels.sampling import SamplingColumns
from manylora.server.kernels.shape import DecoderShape
from manylora.server.kernels.step import Ints, StepBatch, lora_spans
from manylora.server.kernels.weights import DecoderWeights, EmbeddingWeight, LayerWeights, LinearWeight

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PlainPlan:
    """A step, and what all of its layers share."""

    batch: StepBatch
    weights: DecoderWeights
    kv: PlainKVCache
    arena: PlainArena
    attention: AttentionPlan
    lora: LoraMetadata | None
    """None when every token is the base's."""
    cos: Tensor
    """Of the tokens' positions, [T, 1, head dim]."""
    sin: Tensor

    def add_deltas(self, layer: int, module: str, x: Tensor, out: Tensor) -> None:
        """Add the adapters' deltas for ``x`` [n, in] to ``out`` [n, out_features] in place."""
        if self.lora is not None:
            a, b = self.arena.layers[layer][module]
            self.lora.add(module, x, a, b, out)


class PlainBackend:
    """Plain torch on one device in one dtype; see Backend."""

    keeper = None
    sampling = None
    wakes = False

    def __init__(self, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype | None = None) -> None:
        """``kv_dtype``: int8, or a floating-point type; None: ``dtype``."""
        self.device = device
        self.dtype = dtype
        self.kv_dtype = kv_dtype or dtype
        self._least_rows = MATMUL_LIMITS[dtype].least_rows
        reason = fused_nf4_reason(device, dtype)
        self._fuses_nf4 = reason is None
        self.nf4_kernel = (
            "bitsandbytes' fused kernel" if reason is None else f"dequantise + matmul ({reason})"
        )
        log.debug("NF4 matmul: %s", self.nf4_kernel)

    @property
    def description(self) -> str:
        """See Backend."""
        return f"plain torch; NF4 by {self.nf4_kernel}"

    def quantize_nf4(self, matrix: Tensor, *, double_quant: bool) -> Nf4Tensor:
        """See Backend."""
        return quantize_nf4(matrix, double_quant=double_quant)

    def quantize_int8(self, matrix: Tensor) -> Int8Tensor:
        """See Backend."""
        return quantize_int8(matrix)

    def prepare(self, parts: Sequence[WeightSource], bias: Tensor | None) -> PlainLinear:
        """See Backend."""
        bias = None if bias is None else bias.to(self.device, self.dtype)
        if self._fuses_nf4 and can_fuse_nf4(parts):
            return fuse_nf4([part for part in parts if isinstance(part, Nf4Tensor)], bias)
        if any(part.is_quantized for part in parts):
            own = (part.to(self.device) if part.is_quantized else self._dense(part) for part in parts)
            return DequantizedLinear(tuple(own), bias, self.dtype)
        matrices = [part.dequantize(self.dtype) for part in parts]
        return DenseLinear(
            self._own(matrices[0]) if len(parts) == 1 else torch.cat(matrices).to(self.device), bias
        )

    def prepare_embedding(self, matrix: Tensor, *, tied: bool) -> Tensor:
        """See Backend."""
        return self._own(matrix)

    def prepare_head(self, matrix: WeightSource) -> PlainLinear:
        """See Backend."""
        return self.prepare([matrix], None)

    def _dense(self, part: WeightSource) -> DenseTensor:
        return DenseTensor(self._own(part.dequantize(self.dtype)))

    def _own(self, matrix: Tensor) -> Tensor:
        """Return a copy as the backend holds it."""
        return matrix.to(self.device, self.dtype, copy=True)

    def tie_head(self, embedding: EmbeddingWeight) -> PlainLinear:
        """See Backend."""
        return DenseLinear(own(embedding, Tensor), None)

    def assemble(self, weights: DecoderWeights) -> DecoderWeights:
        """See Backend."""
        return weights

    def block_bytes(self, shape: DecoderShape, block_size: int) -> int:
        """See Backend."""
        return bytes_per_block(shape, block_size, self.kv_dtype)

    def row_bytes(self, shape: DecoderShape) -> Mapping[str, int]:
        """See Backend."""
        return bytes_per_row(shape, self.dtype)

    def new_kv(self, shape: DecoderShape, num_blocks: int, block_size: int) -> PlainKVCache:
        """See Backend."""
        return PlainKVCache(shape, num_blocks, block_size, self.kv_dtype, self.device)

    def new_arena(self, shape: DecoderShape, rows: int) -> PlainArena:
        """See Backend."""
        return PlainArena(shape, rows, self.dtype, self.device)

    def begin_step(self, model: DecoderWeights, batch: StepBatch, kv: KVCache, arena: RankArena) -> PlainPlan:
        """See Backend."""
        kv, attention = own(kv, PlainKVCache), batch.attention
        windows = {layer.window for layer in model.layers}
        rows = max(len(batch.token_ids), self._least_rows)
        positions = index_tensor(attention.positions, self.device)
        return PlainPlan(
            batch,
            model,
            kv,
            own(arena, PlainArena),
            plan_attention(attention, kv.block_size, windows, self.device),
            build_lora_metadata(lora_spans(batch), rows, self.device, self.dtype),
            model.cos[positions][:, None],
            model.sin[positions][:, None],
        )

    def embed(self, plan: PlainPlan) -> Tensor:
        """See Backend. Rows past T are those that ``least_rows`` asks for."""
        ids = self._padded(plan.batch.token_ids)
        return F.embedding(ids, own(plan.weights.embedding, Tensor))

    def attn_in(self, plan: PlainPlan, layer: int, x: Tensor) -> Tensor:
        """See Backend."""
        weights = plan.weights.layers[layer]
        h = rms_norm(x, weights.attn_norm, plan.weights.eps)
        y = _multiply(weights.qkv, h)
        _add_slices(plan, layer, ("q_proj", "k_proj", "v_proj"), h, y)
        return y

    def attend(self, plan: PlainPlan, layer: int, qkv: Tensor) -> Tensor:
        """See Backend."""
        weights, shape = plan.weights.layers[layer], plan.weights.shape
        k_cache, v_cache = plan.kv.layers[layer]
        q, k, v = self._rotated(plan, weights, qkv)
        k_cache.write(plan.attention.slots, k)
        v_cache.write(plan.attention.slots, v)
        out = qkv.new_zeros(qkv.shape[0], shape.num_heads, shape.head_dim)
        attend(q, k_cache, v_cache, plan.attention, weights.window, out)
        return out.flatten(1)

    def attn_out(self, plan: PlainPlan, layer: int, o: Tensor, x: Tensor) -> Tensor:
        """See Backend."""
        return _project(plan, layer, "o_proj", plan.weights.layers[layer].o, o).add_(x)

    def mlp_in(self, plan: PlainPlan, layer: int, x: Tensor) -> Tensor:
        """See Backend."""
        weights = plan.weights.layers[layer]
        h = rms_norm(x, weights.mlp_norm, plan.weights.eps)
        y = _multiply(weights.gate_up, h)
        _add_slices(plan, layer, ("gate_proj", "up_proj"), h, y)
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def mlp_out(self, plan: PlainPlan, layer: int, h: Tensor, x: Tensor) -> Tensor:
        """See Backend."""
        return _project(plan, layer, "down_proj", plan.weights.layers[layer].down, h).add_(x)

    def forward(self, plan: PlainPlan) -> Tensor:
        """See Backend."""
        return compose(self, plan, plan.weights.shape.num_layers)

    def hidden(self, plan: PlainPlan, x: Tensor, rows: Ints) -> Tensor:
        """See Backend."""
        return rms_norm(x[self._padded(rows)], plan.weights.final_norm, plan.weights.eps)

    def logits(self, plan: PlainPlan, hidden: Tensor, count: int) -> Tensor:
        """See Backend."""
        return _multiply(plan.weights.head, hidden)[:count].float()

    def launch(self, plan: PlainPlan, rows: Ints, columns: SamplingColumns | None) -> Composed:
        """See Backend."""
        return launch_composed(self, plan, rows, plan.batch.state_rows)

    def collect(self, launched: Composed, wake: int = -1) -> StepOutput:
        """See Backend."""
        return collect_composed(launched)

    def finite(self, plan: PlainPlan, x: Tensor) -> Tensor:
        """See Backend. As in PlainKVCache.finite: what is not finite in between stays in the residual stream."""
        states: Tensor = x[: len(plan.batch.token_ids)].mul(0).sum(-1) == 0
        return states & plan.kv.finite(plan.attention.slots)

    def _padded(self, index: Ints) -> Tensor:
        """Bring ``index`` to the device, with zeros up to ``least_rows``."""
        missing = max(0, self._least_rows - len(index))
        return F.pad(index_tensor(index, self.device), (0, missing))

    def _rotated(self, plan: PlainPlan, weights: LayerWeights, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v of the step's tokens, [T, heads, head dim], q and k normalised and rotated."""
        shape, count = plan.weights.shape, len(plan.batch.token_ids)
        heads = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
        q, k, v = torch.split(qkv[:count].view(count, -1, shape.head_dim), heads, dim=1)
        if weights.q_norm is not None and weights.k_norm is not None:
            q = rms_norm(q, weights.q_norm, plan.weights.eps)
            k = rms_norm(k, weights.k_norm, plan.weights.eps)
        return rotate(q, plan.cos, plan.sin), rotate(k, plan.cos, plan.sin), v


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


def _project(plan: PlainPlan, layer: int, module: str, weight: LinearWeight, x: Tensor) -> Tensor:
    y = _multiply(weight, x)
    plan.add_deltas(layer, module, x, y)
    return y


def _add_slices(plan: PlainPlan, layer: int, modules: Sequence[str], x: Tensor, fused: Tensor) -> None:
    """Add each module's deltas to its columns of a fused projection."""
    first = 0
    for module in modules:
        last = first + plan.weights.shape.modules[module][0]
        plan.add_deltas(layer, module, x, fused[:, first:last])
        first = last


def _multiply(weight: LinearWeight, x: Tensor) -> Tensor:
    if not isinstance(weight, PlainLinear):
        raise foreign(weight)
    return weight(x)
