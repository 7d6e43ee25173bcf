"""What a namespace may hold, when two registrations meet, and what is taken for it before more is known."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import pytest

from manylora.adapters.lineage import Lineage
from manylora.adapters.records import AdapterRecord, AdapterState
from manylora.adapters.store import AdapterStore
from manylora.adapters.tokens import AdapterText
from manylora.server.catalog.quota import Quota, Quotas
from manylora.server.catalog.served import Served
from manylora.server.catalog.serving import Entry
from manylora.server.errors import NamespaceFull
from tests.server.catalog.fakes import House


def record(name: str) -> AdapterRecord:
    return AdapterRecord(
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
        state=AdapterState.ACTIVE,
    )


class Store:
    """Each adapter has 600 bytes; while the first size is read, another registration of the tenant's ends."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def nbytes(self, digest: str) -> int:
        other = record("acme/other")
        self._served.follow(Lineage((other,)), Entry(other, AdapterText()))
        return 600


async def test_what_came_in_while_sizes_were_read_counts() -> None:
    served = Served()
    quotas = Quotas(cast(AdapterStore, Store(served)))

    def plan(keep: int) -> Lineage:
        return Lineage((record("acme/new"),))

    quota = Quota("acme", nbytes=1000)
    with pytest.raises(NamespaceFull, match="1,200 bytes, at most 1,000"):
        async with quotas.claimed(quota, "acme/new", served, plan, 2):
            pass
    async with quotas.claimed(replace(quota, nbytes=1200), "acme/new", served, plan, 2) as keep:
        assert (served.names(), keep) == (("acme/other",), 2)


async def test_an_upload_is_no_larger_than_what_a_tenant_may_hold(tmp_path: Path) -> None:
    """Nothing at all, where that is all that is theirs."""
    house = House(tmp_path)
    for nbytes in (0, 1000):
        owner = house.catalog.managed_by(lambda name, version: True, Quota("acme", nbytes=nbytes))
        async with owner.receiving() as upload:
            assert upload.max_bytes == nbytes
    async with house.catalog.receiving() as upload:
        assert upload.max_bytes > 1000
    await house.leave()
