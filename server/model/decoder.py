"""The decoder: one for all families and all backends. What differs between families, ModelConfig says.

A block is five calls of the backend; nothing else happens per layer.
"""

from itertools import pairwise

import torch
from torch import Tensor

from manylora.server.kernels.backend import AttentionWeights
from manylora.server.kernels.lora import LayerLora, LoraMetadata
from manylora.server.kernels.metadata import AttentionMetadata
from manylora.server.kernels.plain import PlainBackend
from manylora.server.model.arena import RankArena
from manylora.server.model.config import ModelConfig
from manylora.server.model.kv_cache import KVCache
from manylora.server.model.rope import rope_tables
from manylora.server.model.step_output import StepOutput
from manylora.server.model.weights import DecoderWeights


class Decoder:
    """A loaded model. ``forward`` is one step over a mixed batch."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights, backend: PlainBackend) -> None:
        self.config = config
        self.weights = weights
        self.backend = backend
        self._cos, self._sin = rope_tables(config.rope, config.head_dim, config.max_position, backend.device)
        windows = config.windows or (None,) * config.num_layers
        self._windows = frozenset(windows)
        self._attention = tuple(
            AttentionWeights(layer.q_norm, layer.k_norm, config.rms_norm_eps, window)
            for layer, window in zip(weights.layers, windows, strict=True)
        )

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor,
        attention: AttentionMetadata,
        lora: LoraMetadata | None,
        arena: RankArena | None,
        kv: KVCache,
        logits_rows: Tensor,
    ) -> StepOutput:
        """Return the logits of the tokens that ``logits_rows`` (int64 [n]) picks, and which tokens are finite.

        token_ids int64 [T]. Writes the keys and values of all T tokens into ``kv``. ``lora`` names rows of ``arena``.
        Raises ValueError if the metadata doesn't fit the tokens, the model or the cache; values of tensors are
        not looked at.
        """
        if lora is not None and arena is None:
            raise ValueError("the step uses adapters, but no arena is given")
        self._check(token_ids, attention, kv)
        backend, eps = self.backend, self.config.rms_norm_eps
        plan = backend.plan_attention(attention, kv.block_size, self._windows)
        rope = self._cos[attention.positions][:, None], self._sin[attention.positions][:, None]
        x = backend.embed(token_ids, self.weights.embedding)
        for index, layer in enumerate(self.weights.layers):
            adapters = None if lora is None or arena is None else LayerLora(lora, arena.layers[index])
            qkv = backend.attn_in(x, layer.attn_norm, eps, layer.qkv, adapters)
            o = backend.attend(qkv, self._attention[index], rope, kv.layers[index], plan)
            x = backend.attn_out(o, layer.o, adapters, x)
            h = backend.mlp_in(x, layer.mlp_norm, eps, layer.gate_up, adapters)
            x = backend.mlp_out(h, layer.down, adapters, x)
        logits = backend.head(x, logits_rows, self.weights.final_norm, eps, self.weights.head)
        # As in KVCache.finite. What is not finite in between stays in the residual stream up to here.
        states = x[: token_ids.shape[0]].mul(0).sum(-1) == 0
        return StepOutput(logits, states & kv.finite(attention.slots))

    def _check(self, token_ids: Tensor, attention: AttentionMetadata, kv: KVCache) -> None:
        count, starts, contexts = token_ids.shape[0], attention.query_start, attention.context_lens
        tables = attention.block_tables
        if attention.positions.shape != (count,) or attention.slots.shape != (count,):
            raise ValueError(f"positions and slots are not {count} each, as the tokens are")
        if starts[0] != 0 or starts[-1] != count or any(b < a for a, b in pairwise(starts)):
            raise ValueError(f"query_start {starts} does not part {count} tokens")
        if len(contexts) != len(starts) - 1 or tables.shape[0] != len(contexts):
            raise ValueError(
                f"{len(starts) - 1} rows, {len(contexts)} contexts, {tables.shape[0]} block tables"
            )
        longest = max(contexts, default=0)
        if longest > self.config.max_position:
            raise ValueError(f"a context of {longest} tokens, but the model has {self.config.max_position}")
        if longest > tables.shape[1] * kv.block_size:
            raise ValueError(f"a context of {longest} tokens, but its table has {tables.shape[1]} blocks")
        if any(context < b - a for context, (a, b) in zip(contexts, pairwise(starts), strict=True)):
            raise ValueError("a row has more tokens than its context")
