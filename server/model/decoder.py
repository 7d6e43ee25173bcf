"""The decoder: one for all families and all backends. What differs between families, ModelConfig says."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from manylora.server.kernels.backend import AnyBackend, KVCache, RankArena
from manylora.server.kernels.output import StepOutput
from manylora.server.kernels.sampling import SamplingColumns
from manylora.server.kernels.step import StepBatch
from manylora.server.kernels.weights import DecoderWeights
from manylora.server.model.config import ModelConfig


class Decoder:
    """A loaded model. ``forward`` is one step over a mixed batch."""

    def __init__(self, config: ModelConfig, weights: DecoderWeights, backend: AnyBackend) -> None:
        self.config = config
        self.weights = weights
        self.backend = backend
        self._model = backend.assemble(weights)
        self._checked: StepBatch | None = None
        """The last batch: as it is kept from step to step, its arrays change and their shapes don't."""

    def new_kv(self, num_blocks: int, block_size: int) -> KVCache:
        """Return an empty KV cache for this model."""
        return self.backend.new_kv(self.weights.shape, num_blocks, block_size)

    def new_arena(self, rows: int) -> RankArena:
        """Return an empty arena for this model's adapters."""
        return self.backend.new_arena(self.weights.shape, rows)

    @torch.inference_mode()
    def launch(
        self, batch: StepBatch, kv: KVCache, arena: RankArena, columns: SamplingColumns | None = None
    ) -> Any:
        """Begin a step and don't wait for it; ``collect`` takes what is returned.

        Writes the keys and values of all T tokens into ``kv``; the batch's adapters name rows of ``arena``. With
        ``columns``, which only a backend with a ``sampling`` of its own takes, tokens are sampled. Raises
        ValueError if the batch doesn't fit the model or the cache; token ids, slots and blocks are not looked at.
        """
        self._check(batch, kv)
        plan = self.backend.begin_step(self._model, batch, kv, arena)
        return self.backend.launch(plan, batch.logits_rows, columns)

    @torch.inference_mode()
    def collect(self, launched: Any, wake: int = -1) -> StepOutput:
        """Return the logits that a step's batch asked for, which tokens are finite, and what was sampled.

        ``wake``: see Backend.collect.
        """
        return self.backend.collect(launched, wake)

    def forward(self, batch: StepBatch, kv: KVCache, arena: RankArena) -> StepOutput:
        """Compute a step, both halves; what is returned is the caller's."""
        output = self.collect(self.launch(batch, kv, arena))
        return replace(output, logits=output.logits.clone(), finite=output.finite.clone())

    def _check(self, batch: StepBatch, kv: KVCache) -> None:
        attention = batch.attention
        longest = int(attention.context_lens.max(initial=0))
        if longest > self.config.max_position:
            raise ValueError(f"a context of {longest} tokens, but the model has {self.config.max_position}")
        width = attention.block_tables.shape[1]
        if longest > width * kv.block_size:
            raise ValueError(f"a context of {longest} tokens, but its table has {width} blocks")
        if batch is not self._checked:
            self._check_shapes(batch)
            self._checked = batch

    @staticmethod
    def _check_shapes(batch: StepBatch) -> None:
        count, attention = batch.token_ids.shape[0], batch.attention
        starts, contexts, tables = attention.query_start, attention.context_lens, attention.block_tables
        lengths = np.diff(starts)
        if attention.positions.shape != (count,) or attention.slots.shape != (count,):
            raise ValueError(f"positions and slots are not {count} each, as the tokens are")
        if starts[0] != 0 or starts[-1] != count or (lengths < 0).any():
            raise ValueError(f"query_start {starts.tolist()} does not part {count} tokens")
        rows = len(starts) - 1
        if len(contexts) != rows or tables.shape[0] != rows or len(batch.adapters.start) != rows + 1:
            raise ValueError(
                f"{rows} rows, {len(contexts)} contexts, {tables.shape[0]} block tables, "
                f"adapters of {len(batch.adapters.start) - 1}"
            )
        if (contexts < lengths).any():
            raise ValueError("a row has more tokens than its context")
