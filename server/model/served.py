"""A decoder with its KV cache and rank arena: what one engine runs its steps on."""

from collections.abc import Sequence

from torch import Tensor

from manylora.server.kernels.metadata import AttentionMetadata, LoraSpan
from manylora.server.model.arena import RankArena
from manylora.server.model.decoder import Decoder
from manylora.server.model.kv_cache import KVCache
from manylora.server.model.step_output import StepOutput


class ServedModel:
    """Callable as one step. Owns the memory that steps write to."""

    def __init__(self, decoder: Decoder, kv: KVCache, arena: RankArena) -> None:
        self.decoder = decoder
        self.kv = kv
        self.arena = arena

    def __call__(
        self, token_ids: Tensor, attention: AttentionMetadata, spans: Sequence[LoraSpan], logits_rows: Tensor
    ) -> StepOutput:
        """Compute T tokens (int64 [T]); return logits of the tokens at ``logits_rows``."""
        lora = self.decoder.backend.build_lora(spans, token_ids.shape[0])
        return self.decoder.forward(token_ids, attention, lora, self.arena, self.kv, logits_rows)
