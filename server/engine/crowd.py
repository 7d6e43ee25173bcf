"""Who of those that wait could begin now: what a step may take beside streams is reckoned with them."""

from collections.abc import Iterable, Iterator

from manylora.server.engine.adapter_cache import AdapterCache
from manylora.server.engine.block_manager import BlockManager
from manylora.server.engine.sequence import Sequence


def with_room(waiting: Iterable[Sequence], blocks: BlockManager, cache: AdapterCache) -> Iterator[Sequence]:
    """Yield those of ``waiting``, in order, for which there are blocks, and whose adapters are on the device."""
    free = blocks.num_free
    for sequence in waiting:
        free -= blocks.blocks_for(len(sequence.token_ids))
        if free < 0:
            return
        if cache.resident(sequence.adapter_ids):
            yield sequence
