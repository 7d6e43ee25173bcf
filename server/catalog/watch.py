"""A directory that is followed: each folder in it that holds an adapter is served under the folder's name.

A folder is taken when two looks find the same files in it, so that what is still being written is left alone. What came
to have its name in another way is never touched, and weights that were taken before don't come back by themselves: who
went back from them meant it. Lives on the event loop; reads in threads.
"""

import asyncio
import os
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path

from manylora.adapters.errors import AdapterError, AdapterNotFound, RegistryBusy, StoreFull
from manylora.adapters.names import check_name
from manylora.adapters.records import AdapterState
from manylora.adapters.sources.finding import Offer
from manylora.adapters.sources.local import operator_source
from manylora.adapters.store import MOST_BYTES
from manylora.server.catalog.catalog import AdapterCatalog
from manylora.server.errors import ServerError, ShuttingDown

_LATER = (StoreFull, RegistryBusy)
"""What may be otherwise at the next look, though the files are the same."""


@dataclass(frozen=True, slots=True)
class _Refused:
    """What a folder holds instead of an adapter."""

    reason: str


class Watch:
    """Follows one directory."""

    def __init__(
        self,
        catalog: AdapterCatalog,
        directory: Path,
        tell: Callable[[str, Exception], None],
        *,
        keep_removed: bool = False,
    ) -> None:
        """``tell`` hears of what can't be served, and why; ``keep_removed``: an adapter stays when its folder goes."""
        self._catalog = catalog
        self._directory = directory.absolute()
        self._tell = tell
        self._keep_removed = keep_removed
        self._seen: dict[str, Hashable] = {}
        """What the last look found in each folder."""
        self._done: dict[str, Hashable] = {}
        """What was taken, or refused, of each."""
        self._taken: dict[str, str] = {}
        """The digest of what each folder's last version was made of."""
        self._faults: dict[str, str] = {}
        """What was said of folders that are tried again."""
        self._was_gone: frozenset[str] = frozenset()
        self._leaving: set[str] = set()
        """Being deleted, which waits for running requests."""
        self._is_readable = True
        self._fault = ""

    async def run(self, seconds: float) -> None:
        """Look every so many seconds, until this is cancelled."""
        while True:
            try:
                await self.look()
                self._fault = ""
            except ShuttingDown:
                return
            except Exception as error:  # the next look may find things better
                if str(error) != self._fault:
                    self._tell(str(self._directory), error)
                self._fault = str(error)
            await asyncio.sleep(seconds)

    async def look(self) -> None:
        """Look once: serve what is new and quiet, replace what changed, delete what was gone at the last look too."""
        try:
            found = await asyncio.to_thread(self._scan)
        except OSError as error:
            # Unmounted, perhaps: what isn't seen isn't gone.
            if self._is_readable:
                self._tell(str(self._directory), error)
            self._is_readable = False
            return
        self._is_readable = True
        before, self._seen = self._seen, dict(found)
        for name, state in found.items():
            if state is not None and before.get(name) == state and self._done.get(name) != state:
                await self._take(name, state)
        await self._drop(found)

    async def _take(self, name: str, state: Hashable) -> None:
        try:
            if isinstance(state, _Refused):
                raise AdapterError(state.reason)
            check_name(name)
            self._check_own(name)
            path = self._directory / name
            offer = Offer(str(path), source=operator_source(path))
            left = await self._left_behind(name, offer)
            self._taken[name] = left or (await self._catalog.put(name, offer)).record.digest
        except ShuttingDown:
            raise
        except _LATER as error:
            self._tell(name, error)
            return
        except (AdapterError, ServerError) as error:
            self._tell(name, error)
        except Exception as error:  # of this folder alone: the next look may find it better
            if self._faults.get(name) != str(error):
                self._tell(name, error)
            self._faults[name] = str(error)
            return
        self._faults.pop(name, None)
        self._done[name] = state

    async def _left_behind(self, name: str, offer: Offer) -> str | None:
        """Return the digest of a folder that holds what it held before, and that its name was taken back from.

        After a start what it held before isn't known: it may be any version that isn't the active one.
        """
        if self._catalog.kind_of(name) is None:
            return None
        active, *others = sorted(
            (each.record for each in self._catalog.versions(name)),
            key=lambda record: record.state is not AdapterState.ACTIVE,
        )
        before = {self._taken[name]} if name in self._taken else {each.digest for each in others}
        before.discard(active.digest)  # which is put all the same: that mends files that are damaged
        digest = await self._catalog.digest_of(offer) if before else None
        return digest if digest in before else None

    async def _drop(self, found: Mapping[str, Hashable]) -> None:
        entries = self._catalog.list()
        own = {each.record.name for each in entries if self._is_own(each.record.name, each.record.source)}
        gone = frozenset(name for name in own if name not in found)
        for name in gone & self._was_gone - self._leaving if not self._keep_removed else ():
            self._leaving.add(name)
            self._catalog.in_background(self._delete(name))
        for name in self._done.keys() - found.keys():
            del self._done[name]
            self._taken.pop(name, None)
        self._was_gone = gone

    async def _delete(self, name: str) -> None:
        try:
            await self._catalog.delete(name)
        except (AdapterError, ServerError) as error:
            self._tell(name, error)
        finally:
            self._leaving.discard(name)

    def _is_own(self, name: str, source: str) -> bool:
        return source == str(self._directory / name)

    def _check_own(self, name: str) -> None:
        kind = self._catalog.kind_of(name)
        if kind is None:
            return
        if kind != "adapter" or not self._is_own(name, self._catalog.get(name).record.source):
            raise AdapterError(
                f"{name!r} was registered in another way, and a folder of that name isn't taken: rename the folder, or"
                " delete what has the name"
            )

    def _scan(self) -> dict[str, Hashable]:
        """Return what is in each folder: of an adapter what changes with it. Raises OSError if nothing can be seen."""
        found: dict[str, Hashable] = {}
        with os.scandir(self._directory) as folders:
            for folder in folders:
                if folder.name.startswith("."):
                    continue
                try:
                    if folder.is_dir():
                        found[folder.name] = operator_source(Path(folder.path)).identify(MOST_BYTES)
                except AdapterNotFound:
                    found[folder.name] = None  # no adapter, or not yet
                except AdapterError as error:
                    found[folder.name] = _Refused(str(error))
                except OSError as error:
                    found[folder.name] = _Refused(f"it can't be read: {error.strerror}")
        return {name: found[name] for name in sorted(found)}
