"""How large the KV cache and the arena are: as set, else out of the memory that is free once the model is loaded."""

from dataclasses import dataclass

import psutil
import torch

from manylora.base import BaseModel
from manylora.server.config import ServeSettings

GIB = 1 << 30
ARENA_SHARE, KV_SHARE = 0.1, 0.3
"""Shares of the memory that is free once the model is loaded."""
MOST_ARENA_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Sizes:
    """The pools, measured at start."""

    num_blocks: int
    arena_rows: int
    kv_bytes: int
    arena_bytes: int


def free_memory(device: torch.device) -> int:
    """Return the free bytes of the device that the pools will live on."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return int(psutil.virtual_memory().available)


def measure(settings: ServeSettings, base: BaseModel, context: int) -> Sizes:
    """Return the sizes of the KV cache and the arena: as set, else from free memory."""
    free = free_memory(base.device)
    backend, shape = base.decoder.backend, base.config.shape
    block, row = backend.block_bytes(shape, settings.block_size), sum(backend.row_bytes(shape).values())
    rows = _arena_rows(settings, free, row)
    budget = int(settings.kv_cache_gib * GIB) or int(free * KV_SHARE)
    # More than every running sequence at full length is of no use.
    most = settings.max_running * -(-context // settings.block_size)
    # One more is held than is given out: the null block.
    blocks = min(max(0, budget // block - 1), most)
    tokens, set_by = blocks * settings.block_size, settings.name_of("kv_cache_gib")
    if tokens < min(context, settings.block_size * 8):
        raise ValueError(f"{budget / GIB:.2f} GiB hold {tokens:,} KV tokens: give more with {set_by}")
    if settings.max_model_len and tokens < context:
        raise ValueError(
            f"{settings.name_of('max_model_len')} {context:,}: {budget / GIB:.2f} GiB hold {tokens:,} KV tokens: give "
            f"more with {set_by}, or a shorter context"
        )
    sizes = Sizes(blocks, rows, (blocks + 1) * block, rows * row)
    _check_free(settings, sizes, free, base.device)
    return sizes


def _check_free(settings: ServeSettings, sizes: Sizes, free: int, device: torch.device) -> None:
    """Refuse pools that memory doesn't hold together. Raises ValueError."""
    # On the CPU adapters' embeddings and heads are the host's copies.
    vocabulary = 0 if device.type == "cpu" else int(settings.vocabulary_gib * GIB)
    if sizes.kv_bytes + sizes.arena_bytes + vocabulary <= free:
        return
    each = {
        "KV cache": (sizes.kv_bytes, "kv_cache_gib"),
        "arena": (sizes.arena_bytes, "arena_rows"),
        "adapters' embeddings and heads": (vocabulary, "vocabulary_gib"),
    }
    told = [(what, size, settings.name_of(name)) for what, (size, name) in each.items() if size]
    raise ValueError(
        f"{' and '.join(f'{size / GIB:.2f} GiB of {what}' for what, size, _ in told)} are more than the "
        f"{free / GIB:.2f} GiB that are free: give less with {' or '.join(flag for *_, flag in told)}"
    )


def _arena_rows(settings: ServeSettings, free: int, row: int) -> int:
    """Return the rank rows of each module: as set, in rows or in bytes, else from free memory. Raises ValueError."""
    if settings.arena_rows and settings.arena_gib:
        both = f"{settings.name_of('arena_rows')} and {settings.name_of('arena_gib')}"
        raise ValueError(f"{both} both say how large the arena is: give one of them")
    if not settings.arena_gib:
        return settings.arena_rows or max(
            settings.max_rank + 1, min(MOST_ARENA_ROWS, int(free * ARENA_SHARE) // row)
        )
    rows = int(settings.arena_gib * GIB) // row
    if not rows:
        raise ValueError(
            f"{settings.name_of('arena_gib')} {settings.arena_gib:g}: one rank row of all modules takes "
            f"{row / GIB:.4f} GiB"
        )
    return rows


def context_of(settings: ServeSettings, base: BaseModel) -> int:
    """Return the longest context in tokens: as set, else the base's own. Raises ValueError for one that it hasn't."""
    most = base.config.max_position
    if settings.max_model_len > most:
        raise ValueError(
            f"{settings.name_of('max_model_len')} {settings.max_model_len:,}: the base has {most:,} positions "
            "(max_position_embeddings in its config.json); give no more"
        )
    return settings.max_model_len or most
