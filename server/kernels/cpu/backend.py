"""The native CPU backend: 4- and 8-bit weights times activations of 8 bits or bfloat16, a whole step in one call.

Sums are integers within a group of weights (floats in one fixed order, of bfloat16) and floats in one fixed order over
groups, whatever the tile and whoever works on it: a row's bits don't depend on who shares its batch, at full speed. The
residual stream is float32; adapters are bfloat16, keys and values too, or in 8 bits.
"""

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from manylora.quant.dense import DenseTensor
from manylora.quant.int8 import Int8Tensor
from manylora.quant.nf4 import Nf4Tensor
from manylora.server.kernels.backend import KVCache, RankArena, WeightSource
from manylora.server.kernels.cpu import abi
from manylora.server.kernels.cpu.arena import CpuArena, bytes_per_row
from manylora.server.kernels.cpu.encode import encode_int8, encode_nf4
from manylora.server.kernels.cpu.keeper import CpuKeeper
from manylora.server.kernels.cpu.kv_cache import FORMS, CpuKVCache, bytes_per_block
from manylora.server.kernels.cpu.library import Kernels
from manylora.server.kernels.cpu.linear import CpuLinear
from manylora.server.kernels.cpu.memory import WeightMemory
from manylora.server.kernels.cpu.model import CpuModel
from manylora.server.kernels.cpu.own_embeddings import own_embeddings
from manylora.server.kernels.cpu.pack import SPLIT_MOST, PackedMatrix, SplitTensor, pack
from manylora.server.kernels.cpu.plan import CpuPlan, Op, plan_step
from manylora.server.kernels.cpu.run import CpuStep, SamplingCall
from manylora.server.kernels.output import StepOutput
from manylora.server.kernels.owned import own
from manylora.server.kernels.plain.vocabulary import StepVocabulary, multiplied
from manylora.server.kernels.sampling import Sampled, SamplingColumns
from manylora.server.kernels.shape import DecoderShape
from manylora.server.kernels.step import Ints, StepBatch
from manylora.server.kernels.weights import DecoderWeights, EmbeddingWeight, LinearWeight

HEAD_GROUP = 32
"""Inputs that share a scale in the head, of weights and activations: logits are more sensitive than layers are. By 64
the head alone would be a third of what 8-bit activations cost."""
PIECE = 1 << 21
"""Weights of a piece of rows: 8 MiB."""
CPU = torch.device("cpu")
Activations: TypeAlias = Literal["int8", "bfloat16"]
"""What 4- and 8-bit weights are multiplied by. Weights are laid out alike for both."""
ACTIVATIONS: Mapping[Activations, int] = {"int8": abi.ACTIVATIONS_INT8, "bfloat16": abi.ACTIVATIONS_BF16}


class CpuBackend:
    """Native kernels on the CPU; see Backend. 16-bit weights are rounded to ``dtype`` before they are packed."""

    def __init__(
        self,
        kernels: Kernels,
        dtype: torch.dtype,
        activations: Activations = "int8",
        kv_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """``kv_dtype``: bfloat16 or int8."""
        assert kv_dtype in FORMS, kv_dtype
        self.device = CPU
        self.dtype = dtype
        self.activations = activations
        self.kv_dtype = kv_dtype
        self._kernels = kernels
        self._memory = WeightMemory()
        self.keeper = CpuKeeper(kernels, f"head in halves of 8 bits by {HEAD_GROUP}, from {dtype}")

    @property
    def description(self) -> str:
        """See Backend."""
        return (
            f"native {self._kernels.level}, {self.activations} activations, threads: {self._kernels.threads}"
        )

    def quantize_nf4(self, matrix: Tensor, *, double_quant: bool) -> Nf4Tensor:
        """See Backend."""
        return encode_nf4(matrix, self._kernels, double_quant=double_quant)

    def quantize_int8(self, matrix: Tensor) -> Int8Tensor:
        """See Backend."""
        return encode_int8(matrix, self._kernels)

    def prepare(self, parts: Sequence[WeightSource], bias: Tensor | None) -> CpuLinear:
        """See Backend."""
        widths = [part.shape[0] for part in parts]
        biases = [None] * len(parts) if bias is None else torch.split(bias.float(), widths)
        return CpuLinear(tuple(map(self._pack, parts, biases)))

    def prepare_embedding(self, matrix: Tensor, *, tied: bool) -> CpuLinear:
        """See Backend. Where it is the head too it is held in 8 bits, else as it is."""
        return CpuLinear((self._pack_head(matrix) if tied else self._pack(DenseTensor(matrix), None),))

    def prepare_head(self, matrix: WeightSource) -> CpuLinear:
        """See Backend. It is held in 8 bits, unless it is in 8 or fewer already."""
        if isinstance(matrix, DenseTensor):
            return CpuLinear((self._pack_head(matrix.weight),))
        return self.prepare([matrix], None)

    def tie_head(self, embedding: EmbeddingWeight) -> CpuLinear:
        """See Backend."""
        return own(embedding, CpuLinear)

    def rows(self, weight: LinearWeight, first: int, last: int) -> Iterator[Tensor]:
        """See Backend."""
        activations = ACTIVATIONS[self.activations]
        start = 0
        for part in own(weight, CpuLinear).parts:
            structure = part.structure(activations)
            begin, end = max(first - start, 0), min(last - start, part.shape[0])
            for row in range(begin, end, step := max(1, PIECE // part.shape[1])):
                piece = torch.empty(min(step, end - row), part.shape[1])
                self._kernels.call(
                    "matrix_rows", ctypes.addressof(structure), row, len(piece), piece.data_ptr()
                )
                yield piece
            start += part.shape[0]

    def bias(self, weight: LinearWeight) -> Tensor | None:
        """See Backend."""
        found = [part.bias for part in own(weight, CpuLinear).parts]
        biases = [bias for bias in found if bias is not None]
        return torch.cat(biases) if len(biases) == len(found) else None

    @property
    def rows_form(self) -> str:
        """See Backend."""
        return f"{self.keeper.layout}, {self.activations} activations"

    def assemble(self, weights: DecoderWeights) -> CpuModel:
        """See Backend."""
        return CpuModel(weights, ACTIVATIONS[self.activations])

    def block_bytes(self, shape: DecoderShape, block_size: int) -> int:
        """See Backend."""
        return bytes_per_block(shape, block_size, self.kv_dtype)

    def row_bytes(self, shape: DecoderShape) -> Mapping[str, int]:
        """See Backend."""
        return bytes_per_row(shape)

    def new_kv(self, shape: DecoderShape, num_blocks: int, block_size: int) -> CpuKVCache:
        """See Backend."""
        return CpuKVCache(shape, num_blocks, block_size, self.kv_dtype)

    def new_arena(self, shape: DecoderShape, rows: int) -> CpuArena:
        """See Backend."""
        return CpuArena(shape, rows)

    def begin_step(self, model: CpuModel, batch: StepBatch, kv: KVCache, arena: RankArena) -> CpuPlan:
        """See Backend."""
        rows, given = own(arena, CpuArena), None
        vocabulary = StepVocabulary.of(batch, rows.vocabularies, model.structure.vocab)
        if vocabulary:
            given = own_embeddings(self._kernels, model, vocabulary, batch.token_ids)
        return plan_step(model, batch, own(kv, CpuKVCache), rows, given)

    def embed(self, plan: CpuPlan) -> Tensor:
        """See Backend."""
        x = self._new(plan, plan.model.structure.hidden)
        self._run(plan, Op.EMBED, x=x)
        return x

    def attn_in(self, plan: CpuPlan, layer: int, x: Tensor) -> Tensor:
        """See Backend."""
        shape = plan.model.weights.shape
        qkv = self._new(plan, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim)
        self._run(plan, Op.ATTN_IN, layer, x=x, qkv=qkv)
        return qkv

    def attend(self, plan: CpuPlan, layer: int, qkv: Tensor) -> Tensor:
        """See Backend. Rotates the queries in qkv."""
        shape = plan.model.weights.shape
        o = self._new(plan, shape.num_heads * shape.head_dim)
        self._run(plan, Op.ATTEND, layer, qkv=qkv, o=o)
        return o

    def attn_out(self, plan: CpuPlan, layer: int, o: Tensor, x: Tensor) -> Tensor:
        """See Backend. Adds to x in place."""
        self._run(plan, Op.ATTN_OUT, layer, x=x, o=o)
        return x

    def mlp_in(self, plan: CpuPlan, layer: int, x: Tensor) -> Tensor:
        """See Backend."""
        h = self._new(plan, plan.model.structure.intermediate)
        self._run(plan, Op.MLP_IN, layer, x=x, h=h)
        return h

    def mlp_out(self, plan: CpuPlan, layer: int, h: Tensor, x: Tensor) -> Tensor:
        """See Backend. Adds to x in place."""
        self._run(plan, Op.MLP_OUT, layer, x=x, h=h)
        return x

    def forward(self, plan: CpuPlan) -> Tensor:
        """See Backend: one call."""
        x = self._new(plan, plan.model.structure.hidden)
        self._run(plan, Op.FORWARD, x=x)
        return x

    def hidden(self, plan: CpuPlan, x: Tensor, rows: Ints) -> Tensor:
        """See Backend."""
        out = torch.empty(len(rows), x.shape[1])
        index = np.ascontiguousarray(rows, dtype=np.int32)
        self._kernels.call(
            "hidden", plan.model.address, x.data_ptr(), index.ctypes.data, len(index), out.data_ptr()
        )
        return out

    def logits(self, plan: CpuPlan, hidden: Tensor, count: int) -> Tensor:
        """See Backend."""
        out = torch.empty(count, plan.model.structure.vocab)
        if self._kernels.call("linear", plan.model.head_address, hidden.data_ptr(), count, out.data_ptr()):
            raise _no_memory(count)
        return out

    def answer(self, plan: CpuPlan, rows: Ints, hidden: Tensor, logits: Tensor) -> Mapping[int, Tensor]:
        """See Backend."""
        return plan.vocabulary.answer(rows, hidden, logits, self._multiply_rows)

    def _multiply_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """See vocabulary.Multiply. Rows of 16 bits are read by all threads; of others there are none by default."""
        if rows.dtype != torch.bfloat16 or not rows.is_contiguous():
            return multiplied(x, rows)
        states, y = x.float().contiguous(), torch.empty(len(x), len(rows))
        sizes = len(rows), rows.shape[1], states.data_ptr(), len(states), y.data_ptr()
        self._kernels.call("multiply_rows", rows.data_ptr(), *sizes)
        return y

    wakes = True

    @property
    def sampling(self) -> "CpuBackend":
        """See Backend: it samples itself."""
        return self

    def draw(self, logits: Tensor, columns: SamplingColumns) -> Sampled:
        """See NativeSampling."""
        call = SamplingCall(logits, columns)
        if self._kernels.call("sample", call.address):
            raise _no_memory(len(columns.places))
        return call.sampled

    def report(self, logits: Tensor, places: Ints, ids: Ints, told: Ints) -> Sampled:
        """See NativeSampling."""
        call = SamplingCall.of_given(logits, places, ids, told)
        if self._kernels.call("report", call.address):
            raise _no_memory(len(places))
        return call.sampled

    def launch(self, plan: CpuPlan, rows: Ints, columns: SamplingColumns | None) -> CpuStep:
        """See Backend. Lays the call out; ``collect`` makes it.

        Every core computes: what Python did beside it would take one of them away, and with the next barrier all.
        """
        model = plan.model
        if model.last_step is None or not model.last_step.is_of(plan, rows, columns):
            x = model.buffer("x", plan.structure.tokens, model.structure.hidden)
            model.last_step = CpuStep(plan, x, self._call(plan, 0, {"x": x}), rows, columns)
        return model.last_step

    def collect(self, launched: CpuStep, wake: int = -1) -> StepOutput:
        """See Backend: one call, and the interpreter's lock is given up once."""
        if self._kernels.call("run", launched.address(wake)):
            raise _no_memory(launched.plan.structure.tokens)
        plan, wanted = launched.plan, launched.plan.batch.state_rows
        output = launched.output(self.hidden(plan, launched.x, wanted) if len(wanted) else None)
        if not plan.vocabulary:
            return output
        others = self.answer(plan, plan.batch.logits_rows, launched.hidden, output.logits)
        return replace(output, others=others)

    def finite(self, plan: CpuPlan, x: Tensor) -> Tensor:
        """See Backend. What is not finite in between stays in the residual stream."""
        return (x.mul(0).sum(-1) == 0) & torch.from_numpy(plan.finite).bool()

    def _pack_head(self, matrix: Tensor) -> PackedMatrix:
        """Return it in 8 bits whose halves lie apart: for greedy tokens the high ones are nearly all that is read."""
        return self._pack(SplitTensor(encode_int8(matrix, self._kernels, HEAD_GROUP, SPLIT_MOST)), None)

    def _pack(self, source: WeightSource, bias: Tensor | None) -> PackedMatrix:
        return pack(source, bias, self._kernels, self._memory)

    def _new(self, plan: CpuPlan, width: int) -> Tensor:
        return torch.empty(plan.structure.tokens, width)

    def _run(self, plan: CpuPlan, op: Op, layer: int = 0, **buffers: Tensor) -> None:
        call = self._call(plan, layer, buffers)
        if self._kernels.call("step", op, ctypes.addressof(call)):
            raise _no_memory(plan.structure.tokens)

    @staticmethod
    def _call(plan: CpuPlan, layer: int, buffers: Mapping[str, Tensor]) -> abi.Call:
        return abi.Call(
            model=plan.model.address,
            kv=plan.kv.address,
            arena=plan.arena.address,
            step=plan.address,
            layer=layer,
            **{name: buffer.data_ptr() for name, buffer in buffers.items()},
        )


def _no_memory(tokens: int) -> MemoryError:
    return MemoryError(f"no memory for the intermediate results of {tokens} tokens")
