"""Builds an Engine without a server around it: model, pools, adapters that are already on the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from manylora.adapters.types import AdapterWeights
from manylora.loadtest.material.random_model import SyntheticTokens, random_adapter
from manylora.server.engine.adapter_cache import HeldAdapter
from manylora.server.engine.engine import Engine, EngineSettings
from manylora.server.engine.observer import EngineObserver
from manylora.server.engine.step_plan import SchedulerLimits
from manylora.server.kernels.choose import leave_cores_to
from manylora.server.model.decoder import Decoder
from manylora.server.model.served import ServedModel

BLOCK = 16
HOST_BYTES = 1 << 50
"""Host copies are never dropped in a benchmark."""


@dataclass(frozen=True, slots=True)
class EngineSizes:
    """Room in an engine."""

    streams: int
    context: int
    """Tokens of the longest sequence."""
    arena_rows: int
    max_step_tokens: int = 512
    """As `manylora serve` has it."""


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Let torch have its threads again after the block, in which models were ``served``.

    The kernels of the next decoder have as many as torch has.
    """
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def served(decoder: Decoder, rows: int, context: int, rank_rows: int) -> ServedModel:
    """Return a model with room for ``rows`` sequences of ``context`` tokens and adapters of so many rank rows.

    torch keeps one thread beside kernels that have their own, as in the server.
    """
    leave_cores_to(decoder.backend)
    kv = decoder.new_kv(rows * -(-context // BLOCK), BLOCK)
    return ServedModel(decoder, kv, decoder.new_arena(max(1, rank_rows)))


def build_engine(decoder: Decoder, sizes: EngineSizes, observer: EngineObserver | None = None) -> Engine:
    """Return an engine on ``decoder`` with no adapters, whose tokens never end a sequence."""
    config, backend = decoder.config, decoder.backend
    model = served(decoder, sizes.streams, sizes.context, sizes.arena_rows)
    settings = EngineSettings(
        vocab_size=config.vocab_size,
        num_blocks=model.kv.num_blocks,
        block_size=BLOCK,
        arena_rows=model.arena.rows,
        host_bytes=HOST_BYTES,
        row_bytes=backend.row_bytes(config.shape),
        limits=SchedulerLimits(max_running=sizes.streams, max_step_tokens=sizes.max_step_tokens),
    )
    tokens = SyntheticTokens(config.vocab_size)
    return Engine(model, model.arena, tokens, frozenset(), settings, backend.device, _never_loads, observer)


def add_random_adapters(engine: Engine, decoder: Decoder, ranks: list[int]) -> list[int]:
    """Put one adapter of each rank on the device; return their ids, from 1."""
    ids = list(range(1, len(ranks) + 1))
    for adapter_id, rank in zip(ids, ranks, strict=True):
        backend = decoder.backend
        weights = random_adapter(decoder.config, rank, backend.dtype, backend.device, adapter_id)
        add_adapter(engine, adapter_id, weights)
    return ids


def add_adapter(engine: Engine, adapter_id: int, weights: AdapterWeights) -> None:
    """Put an adapter on the device."""
    held = HeldAdapter(adapter_id, weights.rank_by_module(), lambda: weights, True, weights)
    engine.add_adapter(held)
    while not engine.preload(adapter_id, None):
        engine.step()


def _never_loads(held: HeldAdapter) -> None:
    raise AssertionError(f"adapter {held.adapter_id} is on the device and never read again")
