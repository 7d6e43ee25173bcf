"""What a namespace may hold, when two registrations meet."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import cast

import pytest

from manylora.adapters.records import AdapterRecord, AdapterState
from manylora.adapters.spec import AdapterSpec
from manylora.adapters.store import AdapterStore
from manylora.adapters.tokens import AdapterText
from manylora.adapters.types import AdapterWeights
from manylora.server.catalog.intake import Prepared
from manylora.server.catalog.quota import Quota, Quotas
from manylora.server.catalog.serving import Entry
from manylora.server.errors import NamespaceFull


def entry(name: str) -> Entry:
    record = AdapterRecord(
        1,
        name,
        1,
        f"digest of {name}",
        "src",
        8,
        ("q_proj",),
        pinned=False,
        preload=False,
        created_at=datetime.now(UTC),
        state=next(iter(AdapterState)),
    )
    return Entry(record, AdapterText())


class Store:
    """Each adapter has 600 bytes; while the first size is read, another registration of the tenant's ends."""

    def __init__(self, entries: dict[str, Entry]) -> None:
        self._entries = entries

    def nbytes(self, digest: str) -> int:
        self._entries.setdefault("acme/other", entry("acme/other"))
        return 600


async def test_what_came_in_while_sizes_were_read_counts() -> None:
    entries: dict[str, Entry] = {}
    quotas = Quotas(cast(AdapterStore, Store(entries)))
    prepared = Prepared(
        "digest of it", cast(AdapterSpec, None), 8, AdapterText(), cast(AdapterWeights, None)
    )  # of which only the digest and the rank count
    quota = Quota("acme", nbytes=1000)
    with pytest.raises(NamespaceFull, match="1,200 bytes, at most 1,000"):
        async with quotas.claimed(quota, "acme/new", entries, prepared):
            pass
    async with quotas.claimed(replace(quota, nbytes=1200), "acme/new", entries, prepared):
        assert set(entries) == {"acme/other"}
