"""Faults at every place where a change may end: calls of the engine, statements and commits of the registry, files.

Armed, it counts such places and breaks one of them; or from one on every one, as if the process were gone: what is on
the disk then is what a kill leaves. Places are passed on the event loop and in threads.
"""

import contextlib
import errno
import os
import sqlite3
import sqlite3.dbapi2
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from manylora.adapters.types import AdapterWeights, FreedAdapter, Tier
from manylora.server.engine.async_engine import AsyncEngine
from manylora.server.errors import StepFailed


@dataclass(slots=True)
class Chaos:
    """When the next fault is due."""

    left: int | None = None
    """Places until then; None: never."""
    for_good: bool = False
    """Whether every place from then on breaks."""
    broken: int = 0
    """Faults since it was armed."""
    total: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def arm(self, places: int, *, for_good: bool = False) -> None:
        """Break the place that is passed after so many others."""
        with self._lock:
            self.left, self.for_good, self.broken = places, for_good, 0

    def disarm(self) -> bool:
        """Break nothing any more; return whether something broke."""
        with self._lock:
            self.left = None
            return self.broken > 0

    def due(self) -> bool:
        """Return whether the place that is passed now breaks."""
        with self._lock:
            if self.left is None:
                return False
            self.left -= 1
            breaks = self.left < 0 if self.for_good else self.left == -1
            self.broken += breaks
            self.total += breaks
            return breaks


class FrailEngine:
    """An engine whose calls may fail before they change anything. See catalog.AdapterEngine."""

    def __init__(self, engine: AsyncEngine, chaos: Chaos) -> None:
        self._engine = engine
        self._chaos = chaos

    def _pass(self, *, only_if_gone: bool = False) -> None:
        # An engine that can't let an adapter go can't do anything any more.
        if only_if_gone and not self._chaos.for_good:
            return
        if self._chaos.due():
            raise StepFailed("a fault in the engine")

    async def add_adapter(
        self,
        adapter_id: int,
        weights: AdapterWeights,
        *,
        load_from: Callable[[], AdapterWeights],
        preload: bool,
        pinned: bool,
    ) -> None:
        """See catalog.AdapterEngine."""
        self._pass()
        await self._engine.add_adapter(
            adapter_id, weights, load_from=load_from, preload=preload, pinned=pinned
        )

    async def add_adapter_cold(
        self,
        adapter_id: int,
        rank_by_module: Mapping[str, int],
        *,
        load_from: Callable[[], AdapterWeights],
        pinned: bool,
        invocation: tuple[int, ...] = (),
    ) -> None:
        """See catalog.AdapterEngine."""
        await self._engine.add_adapter_cold(
            adapter_id, rank_by_module, load_from=load_from, pinned=pinned, invocation=invocation
        )

    async def keep_adapter(
        self, adapter_id: int, weights: AdapterWeights | None, *, preload: bool, pinned: bool
    ) -> None:
        """See catalog.AdapterEngine."""
        self._pass()
        await self._engine.keep_adapter(adapter_id, weights, preload=preload, pinned=pinned)

    async def remove_adapter(self, adapter_id: int, *, abort: bool) -> FreedAdapter:
        """See catalog.AdapterEngine."""
        self._pass(only_if_gone=True)
        return await self._engine.remove_adapter(adapter_id, abort=abort)

    async def rest_adapter(self, adapter_id: int) -> None:
        """See catalog.AdapterEngine."""
        self._pass()
        await self._engine.rest_adapter(adapter_id)

    def adapter_tier(self, adapter_id: int) -> Tier:
        """See catalog.AdapterEngine."""
        return self._engine.adapter_tier(adapter_id)


@contextlib.contextmanager
def frail_databases(chaos: Chaos) -> Iterator[None]:
    """Have statements and commits of databases that are opened in the block fail when that is due."""

    def pass_by() -> None:
        if chaos.due():
            raise sqlite3.OperationalError("disk I/O error")

    class Cursor(sqlite3.Cursor):
        def execute(self, *arguments: Any) -> "Cursor":
            pass_by()
            super().execute(*arguments)
            return self

    class Connection(sqlite3.Connection):
        def cursor(self, *_: Any) -> Any:
            return super().cursor(Cursor)

        def commit(self) -> None:
            pass_by()
            super().commit()

    connect = partial(sqlite3.connect, factory=Connection)
    # What the registry's library opens databases with.
    with mock.patch.object(sqlite3.dbapi2, "connect", connect):
        yield


@contextlib.contextmanager
def frail_files(home: Path, chaos: Chaos) -> Iterator[None]:
    """Have files below ``home`` not be made, written, moved or synced when that is due."""
    place = str(home)

    def failing(real: Callable[..., Any], concerns: Callable[..., bool]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if concerns(*arguments) and chaos.due():
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments, **named)

        return call

    def below(path: object, *_: object) -> bool:
        return str(path).startswith(place)

    def written(path: object, mode: str = "r", *_: object) -> bool:
        return below(path) and mode[0] in "wxa"

    with (
        mock.patch.object(Path, "rename", failing(Path.rename, below)),
        mock.patch.object(Path, "mkdir", failing(Path.mkdir, below)),
        mock.patch.object(Path, "open", failing(Path.open, written)),
        mock.patch.object(os, "fsync", failing(os.fsync, lambda handle: True)),
    ):
        yield
