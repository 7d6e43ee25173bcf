"""The decoder: one for all families and all backends. What differs between families, ModelConfig says.

A block is five calls of the backend; nothing else happens per layer.
"""

import torch
from torch import Tensor

from server.kernels.backend import AttentionWeights
from server.kernels.lora import LayerLora, LoraMetadata
from server.kernels.metadata import AttentionMetadata
from server.kernels.plain import PlainBackend
from server.model.arena import RankArena
from server.model.config import ModelConfig
from server.model.kv_cache import KVCache
from server.model.rope import rope_tables
from server.model.weights import DecoderWeights


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
    ) -> Tensor:
        """Return logits, float32 [n, vocab], of the tokens that ``logits_rows`` (int64 [n]) picks.

        token_ids int64 [T]. Writes the keys and values of all T tokens into ``kv``. ``lora`` and the arena whose
        rows it names come together.
        """
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
        return backend.head(x, logits_rows, self.weights.final_norm, eps, self.weights.head)
