"""Names, versions and states of adapters in SQLite. Knows no tensors, and of files only their digest.

A row begins as pending, becomes active or a canary in one transaction with what that makes of its name's other
versions (adapters/lineage.py), and stays as retired; an attempt that fails deletes its pending row. AUTOINCREMENT
never gives an id twice, not even one of a deleted row. All methods block (about a millisecond) and may be called from
any thread.
"""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from sqlalchemy import ColumnElement, Connection, delete, func, insert, select, update

from manylora.adapters.errors import UnknownAdapter
from manylora.adapters.key_registry import KeyRegistry
from manylora.adapters.lineage import Lineage
from manylora.adapters.lineage_rows import all_lineages, begin, end_all, find_lineage, write
from manylora.adapters.mixture_registry import MixtureRegistry, check_no_mixture
from manylora.adapters.names import check_name, list_names
from manylora.adapters.ownership import DirectoryLock
from manylora.adapters.records import (
    ADAPTERS,
    IDENTITY,
    RECORDS,
    VERSIONS,
    AdapterRecord,
    AdapterState,
    to_record,
)
from manylora.adapters.registry_database import RegistryDatabase
from manylora.adapters.reserve import Reserve


class AdapterRegistry:
    """The adapters' table in the file at ``path``, made if need be. Close it, or use it in ``with``."""

    def __init__(
        self,
        path: Path,
        *,
        reserved: Sequence[str] = (),
        lock_wait_ms: int = 5000,
        reserve: Reserve | None = None,
        lock: DirectoryLock | None = None,
    ) -> None:
        """``reserved``: the base's names; ``lock_wait_ms``: patience with another process's write.

        ``reserve`` is the space kept for deleting on a full disk; by default a file beside ``path``. ``lock`` is
        released when the registry is closed.
        """
        self._reserved = frozenset(reserved)
        self._database = RegistryDatabase(
            path, lock_wait_ms=lock_wait_ms, reserve=reserve, lock=lock, prepare=_identify
        )
        self.mixtures = MixtureRegistry(self._database, self._reserved)
        """The mixtures' side of the same file; a name is in use on one side only."""
        self.keys = KeyRegistry(self._database, path)
        """The API keys' side of it."""
        with self._database.transaction() as connection:
            self.identity = str(connection.scalar(select(IDENTITY.c.id)))
            """Told once, when the file was made: another file under this name has another."""

    def reserve(
        self,
        name: str,
        digest: str,
        *,
        source: str,
        rank: int,
        targets: Sequence[str],
        pinned: bool = False,
        preload: bool = False,
    ) -> AdapterRecord:
        """Mint an id in a pending record, unseen until ``activate``. Raises InvalidAdapter (bad name)."""
        check_name(name, reserved=self._reserved)
        with self._database.transaction() as connection:
            last = select(func.max(ADAPTERS.c.version)).where(
                ADAPTERS.c.name == name, ~_is(AdapterState.PENDING)
            )
            row = insert(ADAPTERS).values(
                name=name,
                version=(connection.scalar(last) or 0) + 1,
                digest=digest,
                source=source,
                rank=rank,
                targets="\n".join(targets),
                pinned=pinned,
                preload=preload,
                created_at=datetime.now(UTC).isoformat(),
                state=AdapterState.PENDING.value,
            )
            made = connection.scalar(row.returning(ADAPTERS.c.id))
            return to_record(connection.execute(RECORDS.where(ADAPTERS.c.id == made)).one())

    def activate(self, record: AdapterRecord, *, keep: int = 0, share: float | None = None) -> Lineage:
        """Put a pending record into service, and return its name's versions: at most ``keep`` old ones.

        It becomes the active one; with ``share`` the canary of a name that has one. The same transaction ends what it
        ends. Raises AdapterNameTaken if a mixture has the name by now, UnknownAdapter for a canary of nothing.
        """
        with self._database.transaction() as connection:
            check_no_mixture(connection, record.name)
            connection.execute(update(IDENTITY).values(used=True))
            if share is None and find_lineage(connection, record.name) is None:
                return begin(connection, record)
            before = self._existing(connection, record.name)
            joined, version = before.joined_by(record), record.version
            after = joined.led_by(version, like=record) if share is None else joined.trying(version, share)
            return write(connection, before, after.trimmed(keep))

    def change(self, name: str, how: Callable[[Lineage], Lineage]) -> Lineage:
        """Make of a name's versions what ``how`` makes of them, and return that: all of it or nothing.

        Raises UnknownAdapter, and what ``how`` raises. Works on a full disk, as far as it ends records.
        """

        def make(connection: Connection) -> Lineage:
            before = self._existing(connection, name)
            return write(connection, before, how(before))

        return self._database.on_a_full_disk_too(make)

    def keep(self, adapter_id: int, *, pinned: bool, preload: bool) -> AdapterRecord:
        """Note where an adapter is to be kept from now on. Return its record."""
        with self._database.transaction() as connection:
            this = ADAPTERS.c.id == adapter_id
            connection.execute(update(ADAPTERS).where(this).values(pinned=pinned, preload=preload))
            return to_record(connection.execute(RECORDS.where(this)).one())

    def abandon(self, adapter_id: int) -> None:
        """Delete a pending record; its id is not used again."""
        with self._database.transaction() as connection:
            _delete_pending(connection, ADAPTERS.c.id == adapter_id)

    def retire(self, name: str) -> AdapterRecord:
        """End all versions of ``name`` and return the one that was active as it is now. Raises UnknownAdapter.

        Works on a full disk, again and again: who runs out of space is told to delete adapters. Call ``keep_space``
        once the files are gone, too.
        """

        def end(connection: Connection) -> AdapterRecord:
            found = self._existing(connection, name)
            end_all(connection, found)
            return replace(found.active, state=AdapterState.RETIRED)

        return self._database.on_a_full_disk_too(end)

    def keep_space(self) -> None:
        """Take the space for deleting on a full disk, as far as it can be had."""
        self._database.keep_space()

    def active(self) -> list[AdapterRecord]:
        """Return all active records in order of their names."""
        with self._database.transaction() as connection:
            found = connection.execute(RECORDS.where(_is(AdapterState.ACTIVE)).order_by(ADAPTERS.c.name))
            return [to_record(row) for row in found]

    def lineages(self) -> list[Lineage]:
        """Return the versions in service of all names, in the order of these."""
        with self._database.transaction() as connection:
            return all_lineages(connection)

    def digests_in_use(self) -> frozenset[str]:
        """Return the digests of records that are in service or pending: the files that must stay."""
        with self._database.transaction() as connection:
            used = select(ADAPTERS.c.digest).where(ADAPTERS.c.state != AdapterState.RETIRED.value).distinct()
            return frozenset(connection.scalars(used))

    def was_used(self) -> bool:
        """Return whether any adapter was ever active."""
        with self._database.transaction() as connection:
            return bool(connection.scalar(select(IDENTITY.c.used)))

    def is_empty(self) -> bool:
        """Return whether there is no record but those of attempts; one of an adapter that was deleted stays."""
        with self._database.transaction() as connection:
            return _is_empty(connection)

    def drop_pending(self) -> int:
        """Delete the records of attempts that a crash cut short; return how many. For start-up."""
        with self._database.transaction() as connection:
            return _delete_pending(connection)

    def close(self) -> None:
        """Close all connections, and let another process have the directory."""
        self._database.close()

    def __enter__(self) -> "AdapterRegistry":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _existing(self, connection: Connection, name: str) -> Lineage:
        found = find_lineage(connection, name)
        if found is None:
            names = connection.scalars(select(ADAPTERS.c.name).where(_is(AdapterState.ACTIVE)))
            raise UnknownAdapter(f"there is no adapter {name!r}; adapters: {list_names(names)}")
        return found


def _identify(connection: Connection) -> None:
    if connection.scalar(select(IDENTITY.c.id)) is None:
        fresh = insert(IDENTITY).values(id=uuid.uuid4().hex, used=not _is_empty(connection))
        connection.execute(fresh)


def _is_empty(connection: Connection) -> bool:
    settled = select(ADAPTERS.c.id).where(~_is(AdapterState.PENDING)).limit(1)
    return connection.scalar(settled) is None


def _is(state: AdapterState) -> ColumnElement[bool]:
    return ADAPTERS.c.state == state.value


def _delete_pending(connection: Connection, *which: ColumnElement[bool]) -> int:
    """Delete records of attempts; return how many."""
    attempts = select(ADAPTERS.c.id).where(_is(AdapterState.PENDING), *which)
    connection.execute(delete(VERSIONS).where(VERSIONS.c.adapter.in_(attempts)))
    return connection.execute(delete(ADAPTERS).where(ADAPTERS.c.id.in_(attempts))).rowcount
