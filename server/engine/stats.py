"""What the engine holds, for metrics and whoever watches."""

from collections.abc import Mapping
from dataclasses import dataclass

from manylora.adapters.types import Tier


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What the engine holds now. Read from another thread, so only nearly consistent."""

    running: int
    waiting: int
    blocks: int
    free_blocks: int
    cached_blocks: int
    arena_rows: Mapping[str, int]
    free_arena_rows: Mapping[str, int]
    adapters: Mapping[Tier, int]
    host_bytes: int
    """Of adapters' copies on the host."""
    resident: tuple[int, ...]
    """Ids of the adapters on the device."""
    waited_for: tuple[int, ...]
    preemptions: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int
