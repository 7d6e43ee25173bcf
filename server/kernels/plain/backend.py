"""The backend that runs everywhere torch does, CPU and CUDA: reference.py's ops composed from torch's own matmuls.

A row's bits don't depend on who shares its batch nor on how its prompt was chunked: matmuls stay within the sizes of
invariance.py, and tests/server/kernels/plain/test_invariance.py holds it. So the rows that an op is given are padded to
``least_rows``. CUDA gives that up, since cuBLAS picks kernels by shape.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

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
from manylora.server.kernels.plain.attention import attend, can_fuse, index_tensor, plan_attention
from manylora.server.kernels.plain.decode_steps import DecodeSteps, Record
from manylora.server.kernels.plain.invariance import limits_on
from manylora.server.kernels.plain.kv_cache import PlainKVCache, bytes_per_block
from manylora.server.kernels.plain.linear import (
    DenseLinear,
    DequantizedLinear,
    PlainLinear,
    can_fuse_nf4,
    fuse_nf4,
    fused_nf4_reason,
    stacked,
)
from manylora.server.kernels.plain.lora import Slices, build_lora_metadata
from manylora.server.kernels.plain.plan import PlainPlan, StepTensors
from manylora.server.kernels.plain.rotary import angles, rotate
from manylora.server.kernels.plain.vocabulary import StepVocabulary
from manylora.server.kernels.sampling import SamplingColumns
from manylora.server.kernels.shape import DecoderShape
from manylora.server.kernels.step import Ints, StepBatch, lora_spans
from manylora.server.kernels.weights import DecoderWeights, EmbeddingWeight, LayerWeights, LinearWeight

log = logging.getLogger(__name__)


class PlainBackend:
    """Plain torch on one device in one dtype; see Backend."""

    keeper = None
    sampling = None
    wakes = False

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        kv_dtype: torch.dtype | None = None,
        record: Record | None = None,
        *,
        fixed_decodes: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        """``kv_dtype``: int8, or a floating-point type; None: ``dtype``.

        ``fixed_decodes``: whether steps that only decode have the sizes of decode_steps.py, so that ``record`` can
        record them. ``fused``: whether RMSNorm and, in 16 bits, attention are each one kernel of torch's; see
        plain_check.py. None: on CUDA.
        """
        self.device = device
        self.dtype = dtype
        self.kv_dtype = kv_dtype or dtype
        limits = limits_on(device, dtype)
        self._least_rows = limits.least_rows
        self._fuses_norm = device.type == "cuda" if fused is None else fused
        self._norm = fused_rms_norm if self._fuses_norm else rms_norm
        self._fused = dtype if self._fuses_norm and can_fuse(dtype, self.kv_dtype) else None
        self._decodes: DecodeSteps | None = None
        if device.type == "cuda" if fixed_decodes is None else fixed_decodes:
            self._decodes = DecodeSteps(self._all_rows, device, dtype, limits, self._fused, record)
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
            parts = stacked(parts) if self.device.type == "cuda" else parts
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

    def rows(self, weight: LinearWeight, first: int, last: int) -> Iterator[Tensor]:
        """See Backend."""
        return _linear(weight).rows(first, last)

    def bias(self, weight: LinearWeight) -> Tensor | None:
        """See Backend."""
        return _linear(weight).bias

    @property
    def rows_form(self) -> str:
        """See Backend."""
        return f"plain, {self.dtype}, {self.nf4_kernel}"

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
        rows = own(arena, PlainArena)
        vocabulary = StepVocabulary.of(batch, rows.vocabularies, _linear(model.head).shape[0])
        derive = partial(self._derive, model, batch, own(kv, PlainKVCache), rows, vocabulary)
        return PlainPlan(batch, model, own(kv, PlainKVCache), rows, vocabulary, derive)

    def _derive(
        self,
        model: DecoderWeights,
        batch: StepBatch,
        kv: PlainKVCache,
        arena: PlainArena,
        vocabulary: StepVocabulary,
    ) -> StepTensors:
        attention, count = batch.attention, len(batch.token_ids)
        windows = {layer.window for layer in model.layers}
        positions = index_tensor(attention.positions, self.device)
        spans, rows = lora_spans(batch), max(count, self._least_rows)
        ids = vocabulary.base_ids(batch.token_ids)
        return StepTensors(
            count,
            self._padded(ids),
            plan_attention(attention, kv.block_size, windows, self.device, self._fused),
            build_lora_metadata(spans, rows, self.device, self.dtype, arena.output_rows),
            *angles(model, positions),
        )

    def embed(self, plan: PlainPlan) -> Tensor:
        """See Backend. Rows past T are those that ``least_rows`` asks for."""
        x = F.embedding(plan.tensors.ids, own(plan.weights.embedding, Tensor))
        plan.vocabulary.embed(plan.batch.token_ids, x)
        return x

    def attn_in(self, plan: PlainPlan, layer: int, x: Tensor) -> Tensor:
        """See Backend."""
        weights = plan.weights.layers[layer]
        h = self._norm(x, weights.attn_norm, plan.weights.eps)
        return _adapted(plan, layer, ("q_proj", "k_proj", "v_proj"), weights.qkv, h)

    def attend(self, plan: PlainPlan, layer: int, qkv: Tensor) -> Tensor:
        """See Backend."""
        weights, shape = plan.weights.layers[layer], plan.weights.shape
        k_cache, v_cache = plan.kv.layers[layer]
        q, k, v = _rotated(plan, weights, qkv)
        attention = plan.tensors.attention
        k_cache.write(attention.slots, k)
        v_cache.write(attention.slots, v)
        out = qkv.new_zeros(qkv.shape[0], shape.num_heads, shape.head_dim)
        attend(q, k_cache, v_cache, attention, weights.window, out)
        return out.flatten(1)

    def attn_out(self, plan: PlainPlan, layer: int, o: Tensor, x: Tensor) -> Tensor:
        """See Backend."""
        return _adapted(plan, layer, ("o_proj",), plan.weights.layers[layer].o, o).add_(x)

    def mlp_in(self, plan: PlainPlan, layer: int, x: Tensor) -> Tensor:
        """See Backend."""
        weights = plan.weights.layers[layer]
        h = self._norm(x, weights.mlp_norm, plan.weights.eps)
        y = _adapted(plan, layer, ("gate_proj", "up_proj"), weights.gate_up, h)
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def mlp_out(self, plan: PlainPlan, layer: int, h: Tensor, x: Tensor) -> Tensor:
        """See Backend."""
        return _adapted(plan, layer, ("down_proj",), plan.weights.layers[layer].down, h).add_(x)

    def forward(self, plan: PlainPlan) -> Tensor:
        """See Backend."""
        return compose(self, plan, plan.weights.shape.num_layers)

    def hidden(self, plan: PlainPlan, x: Tensor, rows: Ints) -> Tensor:
        """See Backend."""
        return self._norm(x[self._padded(rows)], plan.weights.final_norm, plan.weights.eps)

    def logits(self, plan: PlainPlan, hidden: Tensor, count: int) -> Tensor:
        """See Backend."""
        return _multiply(plan.weights.head, hidden)[:count].float()

    def answer(self, plan: PlainPlan, rows: Ints, hidden: Tensor, logits: Tensor) -> Mapping[int, Tensor]:
        """See Backend."""
        return plan.vocabulary.answer(rows, hidden, logits)

    def launch(self, plan: PlainPlan, rows: Ints, columns: SamplingColumns | None) -> Composed:
        """See Backend."""
        if self._decodes is None:
            return launch_composed(self, plan, rows, plan.batch.state_rows)
        return launch_composed(self, plan, rows, plan.batch.state_rows, self._decodes.take)

    def collect(self, launched: Composed, wake: int = -1) -> StepOutput:
        """See Backend."""
        return collect_composed(launched)

    def finite(self, plan: PlainPlan, x: Tensor) -> Tensor:
        """See Backend. As in PlainKVCache.finite: what is not finite in between stays in the residual stream."""
        own_rows = x[: plan.tensors.count]
        # A fused norm's zeros for a row whose squares add up to infinity are told here: see fused_rms_norm.
        power = own_rows.float().square().sum(-1) if self._fuses_norm else None
        left = own_rows.mul(0).sum(-1) if power is None else power.mul_(0)
        return (left == 0) & plan.kv.finite(plan.tensors.attention.slots)

    def _all_rows(self, plan: PlainPlan) -> tuple[Tensor, Tensor]:
        """Compute a step: logits of all its rows, and which are finite."""
        x = self.forward(plan)
        states = self._norm(x, plan.weights.final_norm, plan.weights.eps)
        return _multiply(plan.weights.head, states), self.finite(plan, x)

    def _padded(self, index: Ints) -> Tensor:
        """Bring ``index`` to the device, with zeros up to ``least_rows``."""
        missing = max(0, self._least_rows - len(index))
        return F.pad(index_tensor(index, self.device), (0, missing))


def _rotated(plan: PlainPlan, weights: LayerWeights, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v of the step's tokens, [T, heads, head dim], q and k normalised and rotated."""
    shape, step = plan.weights.shape, plan.tensors
    heads = [shape.num_heads + shape.num_kv_heads, shape.num_kv_heads]
    qk, v = torch.split(qkv[: step.count].view(step.count, -1, shape.head_dim), heads, dim=1)
    if weights.q_norm is not None and weights.k_norm is not None:
        q, k = torch.split(qk, [shape.num_heads, shape.num_kv_heads], dim=1)
        q = rms_norm(q, weights.q_norm, plan.weights.eps)
        k = rms_norm(k, weights.k_norm, plan.weights.eps)
        return rotate(q, step.cos, step.sin), rotate(k, step.cos, step.sin), v
    q, k = torch.split(rotate(qk, step.cos, step.sin), [shape.num_heads, shape.num_kv_heads], dim=1)
    return q, k, v


def fused_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """reference.rms_norm of the residual stream by torch's kernel: one launch for ten, rounded once.

    Where x² overflows it returns zeros; the row stays as it is to the end, where ``finite`` finds it.
    """
    return F.rms_norm(x, weight.shape, weight, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """reference.rms_norm, computed in float32 and returned in x's dtype; NaN where x² overflows."""
    wide = x.float()
    power = wide.pow(2).mean(-1, keepdim=True)
    # 1 / √∞ would make zeros of a row that overflowed, and they would pass for an answer.
    scale = torch.rsqrt(power + eps) + power * 0
    return (wide * scale).to(x.dtype) * weight


def _adapted(plan: PlainPlan, layer: int, modules: Sequence[str], weight: LinearWeight, x: Tensor) -> Tensor:
    """Return x times the weight that ``modules`` share, each with its adapters."""
    y = _multiply(weight, x)
    plan.add_deltas(layer, x, y, _slices(plan, modules), _linear(weight).bias)
    return y


def _slices(plan: PlainPlan, modules: Sequence[str]) -> Slices:
    """Return where each module's outputs are in a fused projection."""
    slices, first = [], 0
    for module in modules:
        last = first + plan.weights.shape.modules[module][0]
        slices.append((module, first, last))
        first = last
    return slices


def _multiply(weight: LinearWeight, x: Tensor) -> Tensor:
    return _linear(weight)(x)


def _linear(weight: LinearWeight) -> PlainLinear:
    if not isinstance(weight, PlainLinear):
        raise foreign(weight)
    return weight
