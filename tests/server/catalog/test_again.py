"""Names that come again: weights that were damaged, half deleted, replaced meanwhile, or shadowed by a new base."""

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch

from manylora.adapters.errors import RegistryBusy
from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.sources.finding import Finding
from manylora.adapters.store import AdapterStore
from manylora.server.catalog import AdapterCatalog, CatalogSettings
from tests.adapters.making import MODULES, VOCABULARY
from tests.server.catalog.fakes import SECONDS, FakeEngine, House


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path)
    yield house
    await house.leave()


async def test_weights_that_were_replaced_while_they_were_looked_up_are_put_back(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, is_intact = threading.Event(), AdapterStore.is_intact

    def noted(store: AdapterStore, digest: str) -> bool:
        found = is_intact(store, digest)
        looked.set()
        return found

    monkeypatch.setattr(AdapterStore, "is_intact", noted)
    first, _ = await house.catalog.register("a", house.source("one"))
    house.source("two", 1)
    house.engine.adding.close()
    replacing = asyncio.create_task(house.catalog.replace("a", "two"))
    await house.engine.adding.reached()
    # It finds that "a" has these weights, and then waits for the name, which means others by then.
    again = asyncio.create_task(house.catalog.put("a", "one"))
    assert await asyncio.to_thread(looked.wait, SECONDS)
    house.engine.adding.open()
    second = await replacing
    outcome = await again
    assert outcome.replaced == second
    assert outcome.record.digest == first.digest
    assert house.catalog.resolve("a").adapters == ((outcome.record.id, 1.0),)
    await house.catalog.settled()
    house.check()


async def test_stored_files_that_are_whole_again_are_served_again(house: House) -> None:
    record, _ = await house.catalog.register("a", house.source("one"))
    stored = house.root / "store" / record.digest
    shutil.copytree(stored, house.root / "kept")
    (stored / "adapter_model.safetensors").write_bytes(b"damaged")
    await house.catalog.settled()
    house.kill()
    house.open()
    await house.catalog.restore()
    assert house.catalog.get("a").reason is not None
    shutil.rmtree(stored)
    shutil.copytree(house.root / "kept", stored)
    again, created = await house.catalog.register("a", "one")
    assert (again, created) == (record, False)
    assert house.catalog.resolve("a").adapters == ((record.id, 1.0),)
    house.check()


async def test_a_delete_that_failed_holds_no_files_once_one_succeeds(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    await house.catalog.register("a", house.source("one"))

    def locked(*_args: object, **_more: object) -> None:
        raise RegistryBusy("locked")

    monkeypatch.setattr(AdapterRegistry, "retire", locked)
    with pytest.raises(RegistryBusy):
        await house.catalog.delete("a")
    monkeypatch.undo()
    await house.catalog.register("a", "one", pin=True)
    await house.catalog.delete("a")
    house.check()
    assert house.store.digests() == frozenset()


async def test_a_name_that_the_new_base_has_is_unavailable_with_its_reason(house: House) -> None:
    await house.catalog.register("a", house.source("one"))
    await house.catalog.settled()
    settings = CatalogSettings(
        base_names=("base", "a"),
        finding=Finding(house.sources),
        modules=MODULES,
        max_rank=16,
        dtype=torch.float32,
        vocab_size=VOCABULARY,
    )
    engine = FakeEngine()
    catalog = AdapterCatalog(engine, house.registry, house.store, settings)
    report = await catalog.restore()
    assert "a" in report.unavailable
    assert "base" in report.unavailable["a"]
    assert not engine.held
    # The name is the base's now, and the adapter can be taken away.
    assert catalog.resolve("a").adapters == ()
    await catalog.delete("a")
    assert catalog.list() == ()
    house.catalog = catalog
    house.engine = engine
