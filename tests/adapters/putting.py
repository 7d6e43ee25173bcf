"""Records put into a registry as the catalog puts them."""

from manylora.adapters.records import AdapterRecord
from manylora.adapters.registry import AdapterRegistry


def put(
    registry: AdapterRegistry,
    name: str,
    digest: str = "d1",
    *,
    source: str = "here",
    keep: int = 0,
    share: float | None = None,
    pinned: bool = False,
    preload: bool = False,
) -> AdapterRecord:
    """Put weights under a name, as its next version or, with ``share``, its canary; return the record."""
    pending = registry.reserve(
        name, digest, source=source, rank=4, targets=("q_proj", "v_proj"), pinned=pinned, preload=preload
    )
    return registry.activate(pending, keep=keep, share=share).get(pending.version)
