"""A decoder with its KV cache and rank arena: what one engine runs its steps on."""

from typing import Any

from manylora.server.kernels.backend import KVCache, RankArena
from manylora.server.kernels.output import StepOutput
from manylora.server.kernels.sampling import NativeSampling, SamplingColumns
from manylora.server.kernels.step import StepBatch
from manylora.server.model.decoder import Decoder


class ServedModel:
    """Runs steps, in two halves. Owns the memory that they write to."""

    def __init__(self, decoder: Decoder, kv: KVCache, arena: RankArena) -> None:
        self.decoder = decoder
        self.kv = kv
        self.arena = arena

    @property
    def sampling(self) -> NativeSampling | None:
        """See Backend.sampling."""
        return self.decoder.backend.sampling

    def launch(self, batch: StepBatch, columns: SamplingColumns | None) -> Any:
        """Begin a step; see Decoder.launch."""
        return self.decoder.launch(batch, self.kv, self.arena, columns)

    @property
    def wakes(self) -> bool:
        """See Backend.wakes."""
        return self.decoder.backend.wakes

    def collect(self, launched: Any, wake: int = -1) -> StepOutput:
        """Wait for a step; see Decoder.collect."""
        return self.decoder.collect(launched, wake)

    def __call__(self, batch: StepBatch) -> StepOutput:
        """Compute a step, both halves; see Decoder.forward."""
        return self.decoder.forward(batch, self.kv, self.arena)
