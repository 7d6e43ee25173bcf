"""What comes in: nobody's download ends, uploads are few and leave nothing, remote versions are remembered."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Hashable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from manylora.adapters.errors import AdapterNotFound, FetchStopped
from manylora.adapters.sources.finding import Offer
from manylora.adapters.sources.local import operator_source
from manylora.adapters.sources.source import Copied, Heard, unheard
from manylora.server.catalog import Quota, intake
from manylora.server.catalog.intake import MOST_OF_A_TENANT, MOST_UPLOADS
from manylora.server.errors import QueueFull
from tests.adapters.making import factors, write
from tests.server.catalog.fakes import SECONDS, House


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path)
    yield house
    await house.leave()


@dataclass(eq=False)
class Elsewhere:
    """A place beyond this machine: a directory, in the version that a test says. It may be slow."""

    path: Path
    version: int = 1
    is_slow: bool = False
    begun: threading.Event = field(default_factory=threading.Event)
    stopped: threading.Event = field(default_factory=threading.Event)
    fetches: int = 0
    is_remote = True

    @property
    def label(self) -> Hashable:
        return str(self.path)

    def identify(self, max_bytes: int) -> Hashable:
        return self.version

    def digest(self, max_bytes: int, heard: Heard = unheard) -> str | None:
        return None

    def fetch(self, folder: Path, max_bytes: int, heard: Heard = unheard) -> Copied:
        self.fetches += 1
        try:
            for done in range(10_000 if self.is_slow else 0):
                self.begun.set()
                heard(done, None)
                time.sleep(0.001)
        except FetchStopped:
            self.stopped.set()
            raise
        if self.is_slow:
            raise AdapterNotFound("it took for ever")
        found = operator_source(self.path).fetch(folder, max_bytes, heard)
        return Copied(found.digest, found.nbytes, self.version)


async def test_a_download_that_nobody_waits_for_any_more_ends(house: House, tmp_path: Path) -> None:
    place = Elsewhere(tmp_path, is_slow=True)
    asked = [asyncio.create_task(house.catalog.put(name, Offer("x", source=place))) for name in "ab"]
    assert await asyncio.to_thread(place.begun.wait, SECONDS)
    asked[0].cancel()
    await asyncio.sleep(0.01)
    assert not place.stopped.is_set(), "the other still waits"
    asked[1].cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    await house.catalog.settled()
    assert place.stopped.is_set()
    assert place.fetches == 1


async def test_a_slow_place_holds_up_no_directory(house: House, tmp_path: Path) -> None:
    house.kill()
    house.open(workers=1, download_workers=1)
    place = Elsewhere(tmp_path, is_slow=True)
    slow = asyncio.create_task(house.catalog.put("slow", Offer("x", source=place)))
    assert await asyncio.to_thread(place.begun.wait, SECONDS)
    await house.catalog.put("a", house.source("a"))
    assert not slow.done()
    slow.cancel()
    await asyncio.gather(slow, return_exceptions=True)


async def test_what_a_place_had_in_a_version_is_known(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the same again is not downloaded again; of the last so many."""
    monkeypatch.setattr(intake, "MOST_KNOWN", 2)
    places = [Elsewhere(write(tmp_path / f"p{seed}", tensors=factors(seed))) for seed in range(3)]
    offers = [Offer("x", source=place) for place in places]
    assert await house.catalog.digest_of(offers[0]) is None
    src = house.source("here", 1)
    assert await house.catalog.digest_of(src) is not None, "a directory is read"
    for name, offer in zip("abc", offers, strict=True):
        await house.catalog.put(name, offer)
    digests = [house.catalog.get(name).record.digest for name in "abc"]
    assert [await house.catalog.digest_of(offer) for offer in offers] == [None, *digests[1:]]
    assert await house.catalog.digest_of(src) == digests[1]
    assert not (await house.catalog.put("c", offers[2])).is_new
    assert [place.fetches for place in places] == [1, 1, 1]
    places[2].version = 2
    assert await house.catalog.digest_of(offers[2]) is None


async def test_uploads_are_few_at_a_time_and_leave_nothing(house: House) -> None:
    catalog = house.catalog
    tenants = [catalog.managed_by(lambda name, version: True, Quota(name)) for name in ("acme", "globex")]
    staging = house.root / "store" / ".staging"
    for _ in range(2):
        async with contextlib.AsyncExitStack() as under_way:
            for _ in range(MOST_OF_A_TENANT):
                await under_way.enter_async_context(tenants[0].receiving())
            with pytest.raises(QueueFull, match="uploaded"):
                await under_way.enter_async_context(tenants[0].receiving())
            await under_way.enter_async_context(tenants[1].receiving())
            for _ in range(MOST_UPLOADS - MOST_OF_A_TENANT - 1):
                await under_way.enter_async_context(catalog.receiving())
            for full in (catalog, tenants[1]):
                with pytest.raises(QueueFull):
                    await under_way.enter_async_context(full.receiving())
            assert len(list(staging.iterdir())) == MOST_UPLOADS
        assert list(staging.iterdir()) == []
