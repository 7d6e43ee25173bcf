"""The plain backend's plan of a step: what all of its layers share."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from manylora.server.kernels.plain.arena import ArenaLayer, PlainArena
from manylora.server.kernels.plain.attention import AttentionPlan
from manylora.server.kernels.plain.kv_cache import PlainKVCache
from manylora.server.kernels.plain.lora import Slices
from manylora.server.kernels.plain.vocabulary import StepVocabulary
from manylora.server.kernels.step import StepBatch
from manylora.server.kernels.weights import DecoderWeights


class StepLora(Protocol):
    """A step's adapters, as one layer after the other adds them."""

    def add_slices(
        self, arena: ArenaLayer, x: Tensor, fused: Tensor, slices: Slices, bias: Tensor | None
    ) -> None:
        """Scale the columns of a projection [n, out], whose modules share their input x [n, in], and add their deltas.

        ``bias`` [out] is what the projection has in it of the base's own, which isn't scaled.
        """
        ...


@dataclass(frozen=True, slots=True)
class StepTensors:
    """A step on the device."""

    count: int
    """T: its tokens. Rows from there on are those that ``least_rows`` asks for."""
    ids: Tensor
    """int64 [n], n ≥ T"""
    attention: AttentionPlan
    lora: StepLora | None
    """None when every token is the base's."""
    cos: Tensor
    """With the next, of the tokens' positions: see rotary.angles."""
    sin: Tensor


class PlainPlan:
    """A step, its model and its memory."""

    def __init__(
        self,
        batch: StepBatch,
        weights: DecoderWeights,
        kv: PlainKVCache,
        arena: PlainArena,
        vocabulary: StepVocabulary,
        derive: Callable[[], StepTensors],
    ) -> None:
        """``derive`` is called when the first op asks: a step that is played back (decode_steps.py) needs none."""
        self.batch = batch
        self.weights = weights
        self.kv = kv
        self.arena = arena
        self.vocabulary = vocabulary
        self._derive = derive

    @cached_property
    def tensors(self) -> StepTensors:
        """What the layers share."""
        return self._derive()

    def add_deltas(self, layer: int, x: Tensor, out: Tensor, slices: Slices, bias: Tensor | None) -> None:
        """Apply the adapters for ``x`` [n, in] to their columns of ``out`` in place; see StepLora."""
        lora = self.tensors.lora
        if lora is not None:
            lora.add_slices(self.arena.layers[layer], x, out, slices, bias)
