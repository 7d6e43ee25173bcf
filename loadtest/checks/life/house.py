"""A catalog on a running engine that may fail anywhere, be left, closed or gone, and be opened again on its disk."""

import sqlite3
from dataclasses import dataclass, field
from pathlib import Path

from manylora.adapters.pairing import REGISTRY_FILE, open_adapters
from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.store import AdapterStore
from manylora.loadtest.checks.bars.walk_house import BASE, Rig
from manylora.loadtest.checks.life.chaos import Chaos, FrailEngine
from manylora.server.catalog import AdapterCatalog
from manylora.server.engine.async_engine import AsyncEngine


@dataclass(slots=True)
class House:
    """What is open now. ``home`` is its disk."""

    rig: Rig
    home: Path
    keep: int
    chaos: Chaos = field(default_factory=Chaos)
    engine: AsyncEngine = field(init=False)
    catalog: AdapterCatalog = field(init=False)
    registry: AdapterRegistry = field(init=False)
    store: AdapterStore = field(init=False)

    async def open(self) -> None:
        """Start on what is on the disk, as a server does."""
        self.registry, self.store = open_adapters(self.home, reserved=(BASE,))
        self.engine = self.rig.engine()
        self.engine.start()
        settings = self.rig.settings(keep_versions=self.keep)
        frail = FrailEngine(self.engine, self.chaos)
        self.catalog = AdapterCatalog(frail, self.registry, self.store, settings)
        await self.catalog.restore()

    async def close(self) -> None:
        """Let all end, and close; after ``chaos`` broke everything that is what a kill leaves."""
        await self.catalog.close()
        await self.engine.stop()

    def pending(self) -> int:
        """Return how many records the registry has of attempts."""
        with sqlite3.connect(self.home / REGISTRY_FILE) as connection:
            [[count]] = connection.execute("SELECT count(*) FROM adapters WHERE state = 'pending'").fetchall()
        return int(count)

    def staged(self) -> int:
        """Return how many staged copies the store holds."""
        return len(list((self.home / "adapters" / ".staging").iterdir()))
