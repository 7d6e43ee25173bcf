"""A decoder with its KV cache and rank arena: what one engine runs its steps on."""

from manylora.server.kernels.backend import KVCache, RankArena
from manylora.server.kernels.step import StepBatch, StepOutput
from manylora.server.model.decoder import Decoder


class ServedModel:
    """Callable as one step. Owns the memory that steps write to."""

    def __init__(self, decoder: Decoder, kv: KVCache, arena: RankArena) -> None:
        self.decoder = decoder
        self.kv = kv
        self.arena = arena

    def __call__(self, batch: StepBatch) -> StepOutput:
        """Compute a step; see Decoder.forward."""
        return self.decoder.forward(batch, self.kv, self.arena)
