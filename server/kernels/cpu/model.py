"""A decoder's weights as the kernels read them: C structures that point into packed matrices."""

import ctypes
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from manylora.server.kernels.cpu import abi
from manylora.server.kernels.cpu.linear import CpuLinear
from manylora.server.kernels.cpu.pack import PackedMatrix
from manylora.server.kernels.owned import own
from manylora.server.kernels.step import LORA_MODULES
from manylora.server.kernels.weights import DecoderWeights, LayerWeights

if TYPE_CHECKING:
    from manylora.server.kernels.cpu.plan import CpuPlan, StepJobs
    from manylora.server.kernels.cpu.run import CpuStep

MOST_KEPT = 256 << 20
"""Bytes of a buffer that is kept from step to step. Larger ones are of prompts whose log probabilities are told."""


class CpuModel:
    """The C side of a decoder, and what keeps its memory alive."""

    def __init__(self, weights: DecoderWeights, activations: int) -> None:
        """``activations``: one of abi's ACTIVATIONS."""
        self.weights = weights
        self._activations = activations
        self.last_jobs: StepJobs | None = None
        """Of the step before: see plan.step_jobs."""
        self.last_plan: CpuPlan | None = None
        self.last_step: CpuStep | None = None
        self.embedding = _parts(weights.embedding)[0]
        self.head = _parts(weights.head)[0]
        self._kept: list[Tensor] = []
        self._whole: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        """Of these, as they were used last."""
        self._truth = torch.ones(0, dtype=torch.bool)
        self._truths = 0
        self._layers = (abi.Layer * len(weights.layers))(*map(self._layer, weights.layers))
        self._matrices = (abi.Matrix * 2)(
            self.embedding.structure(activations), self.head.structure(activations)
        )
        shape = weights.shape
        self.structure = abi.Model(
            layers=shape.num_layers,
            hidden=self.embedding.shape[1],
            heads=shape.num_heads,
            kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            intermediate=shape.modules["gate_proj"][0],
            vocab=self.head.shape[0],
            positions=weights.cos.shape[0],
            eps=weights.eps,
            cos=self._floats(weights.cos),
            sin=self._floats(weights.sin),
            layer=ctypes.addressof(self._layers),
            embedding=ctypes.addressof(self._matrices),
            final_norm=self._floats(weights.final_norm),
            head=ctypes.addressof(self._matrices[1]),
        )

    def buffer(self, name: str, rows: int, width: int) -> Tensor:
        """Return float32 [rows, width] that lasts until this is called for ``name`` again.

        The system gives new memory in pages that it fills with zeros first: for 32 rows of logits that takes 2 ms.
        """
        if rows * width * 4 > MOST_KEPT:
            return torch.empty(rows, width)
        kept = self._buffers.get(name)
        if kept is not None and kept.shape == (rows, width):
            return kept
        whole = self._whole.get(name)
        if whole is None or whole.numel() < rows * width:
            whole = self._whole[name] = torch.empty(rows * width)
        kept = self._buffers[name] = whole[: rows * width].view(rows, width)
        return kept

    def truth(self, count: int) -> Tensor:
        """Return a tensor of so many times True."""
        if self._truths != count:
            self._truth, self._truths = torch.ones(count, dtype=torch.bool), count
        return self._truth

    @property
    def address(self) -> int:
        """Of the structure that kernels read."""
        return ctypes.addressof(self.structure)

    @property
    def embedding_address(self) -> int:
        """Of the embedding's matrix."""
        return ctypes.addressof(self._matrices)

    @property
    def head_address(self) -> int:
        """Of the head's matrix."""
        return ctypes.addressof(self._matrices[1])

    def _layer(self, layer: LayerWeights) -> abi.Layer:
        modules = [part.structure(self._activations) for part in _modules(layer)]
        return abi.Layer(
            attn_norm=self._floats(layer.attn_norm),
            q_norm=self._floats(layer.q_norm),
            k_norm=self._floats(layer.k_norm),
            mlp_norm=self._floats(layer.mlp_norm),
            module=(abi.Matrix * len(LORA_MODULES))(*modules),
            window=layer.window or 0,
        )

    def _floats(self, values: Tensor | None) -> int | None:
        """Keep values as float32; return their address."""
        if values is None:
            return None
        self._kept.append(values.to(torch.float32).contiguous())
        return self._kept[-1].data_ptr()


def _modules(layer: LayerWeights) -> Iterator[PackedMatrix]:
    """Yield the matrices in the order of LORA_MODULES."""
    for fused in (layer.qkv, layer.o, layer.gate_up, layer.down):
        yield from _parts(fused)


def _parts(weight: object) -> tuple[PackedMatrix, ...]:
    return own(weight, CpuLinear).parts
