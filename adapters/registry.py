"""Names, versions and states of adapters in SQLite. Knows no tensors, and of files only their digest.

A row begins as pending, becomes active in one transaction that retires its predecessor, and stays as
retired; an attempt that fails deletes its pending row. AUTOINCREMENT never gives an id twice, not even one
of a deleted row. All methods block (about a millisecond) and may be called from any thread.
"""

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from sqlalchemy import ColumnElement, Connection, delete, func, insert, select, update

from manylora.adapters.errors import UnknownAdapter
from manylora.adapters.key_registry import KeyRegistry
from manylora.adapters.mixture_registry import MixtureRegistry, check_no_mixture
from manylora.adapters.names import check_name, list_names, name_taken
from manylora.adapters.ownership import DirectoryLock
from manylora.adapters.records import ADAPTERS, IDENTITY, AdapterRecord, AdapterState, to_record
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

    def register(
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
        """Return the active record of ``name``: the one that has this digest, else a new one.

        Raises AdapterNameTaken if other weights or a mixture have the name, InvalidAdapter for a bad name.
        """
        with self._database.transaction() as connection:
            found = _active(connection, name)
            if found is not None and found.digest != digest:
                raise name_taken(name)
            return found or self._activate(
                connection, self._reserve(connection, name, digest, source, rank, targets, pinned, preload)
            )

    def replace(
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
        """Return a new active record of ``name``, one version on; the old one is retired with it."""
        with self._database.transaction() as connection:
            self._existing(connection, name)
            record = self._reserve(connection, name, digest, source, rank, targets, pinned, preload)
            return self._activate(connection, record)

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
        with self._database.transaction() as connection:
            return self._reserve(connection, name, digest, source, rank, targets, pinned, preload)

    def activate(self, record: AdapterRecord) -> AdapterRecord:
        """Make a pending record the active one of its name; the same transaction retires its predecessor.

        Raises AdapterNameTaken if a mixture has the name by now.
        """
        with self._database.transaction() as connection:
            return self._activate(connection, record)

    def keep(self, adapter_id: int, *, pinned: bool, preload: bool) -> AdapterRecord:
        """Note where an adapter is to be kept from now on; return its record."""
        with self._database.transaction() as connection:
            changed = (
                update(ADAPTERS).where(ADAPTERS.c.id == adapter_id).values(pinned=pinned, preload=preload)
            )
            return to_record(connection.execute(changed.returning(ADAPTERS)).one())

    def abandon(self, adapter_id: int) -> None:
        """Delete a pending record; its id is not used again."""
        with self._database.transaction() as connection:
            connection.execute(delete(ADAPTERS).where(ADAPTERS.c.id == adapter_id, _is(AdapterState.PENDING)))

    def retire(self, name: str) -> AdapterRecord:
        """End the active record of ``name`` and return it as it is now. Raises UnknownAdapter.

        Works on a full disk, again and again: who runs out of space is told to delete adapters. Call ``keep_space``
        once the files are gone, too.
        """

        def end(connection: Connection) -> AdapterRecord:
            found = self._existing(connection, name)
            return _set_state(connection, found.id, AdapterState.RETIRED)

        return self._database.on_a_full_disk_too(end)

    def keep_space(self) -> None:
        """Take the space for deleting on a full disk, as far as it can be had."""
        self._database.keep_space()

    def get(self, name: str) -> AdapterRecord:
        """Return the active record of ``name``. Raises UnknownAdapter with the names that exist."""
        with self._database.transaction() as connection:
            return self._existing(connection, name)

    def active(self) -> list[AdapterRecord]:
        """Return all active records in order of their names."""
        with self._database.transaction() as connection:
            rows = connection.execute(
                select(ADAPTERS).where(_is(AdapterState.ACTIVE)).order_by(ADAPTERS.c.name)
            )
            return [to_record(row) for row in rows]

    def digests_in_use(self) -> frozenset[str]:
        """Return the digests of active and pending records: the files that must stay."""
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
            return connection.execute(delete(ADAPTERS).where(_is(AdapterState.PENDING))).rowcount

    def close(self) -> None:
        """Close all connections, and let another process have the directory."""
        self._database.close()

    def __enter__(self) -> "AdapterRegistry":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _existing(self, connection: Connection, name: str) -> AdapterRecord:
        found = _active(connection, name)
        if found is None:
            names = connection.scalars(select(ADAPTERS.c.name).where(_is(AdapterState.ACTIVE)))
            raise UnknownAdapter(f"there is no adapter {name!r}; adapters: {list_names(names)}")
        return found

    def _reserve(
        self,
        connection: Connection,
        name: str,
        digest: str,
        source: str,
        rank: int,
        targets: Sequence[str],
        pinned: bool,
        preload: bool,
    ) -> AdapterRecord:
        check_name(name, reserved=self._reserved)
        last = select(func.max(ADAPTERS.c.version)).where(ADAPTERS.c.name == name, ~_is(AdapterState.PENDING))
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
        return to_record(connection.execute(row.returning(ADAPTERS)).one())

    def _activate(self, connection: Connection, record: AdapterRecord) -> AdapterRecord:
        check_no_mixture(connection, record.name)
        before = _active(connection, record.name)
        if before is not None:
            _set_state(connection, before.id, AdapterState.RETIRED)
        connection.execute(update(IDENTITY).values(used=True))
        return _set_state(connection, record.id, AdapterState.ACTIVE)


def _identify(connection: Connection) -> None:
    if connection.scalar(select(IDENTITY.c.id)) is None:
        fresh = insert(IDENTITY).values(id=uuid.uuid4().hex, used=not _is_empty(connection))
        connection.execute(fresh)


def _is_empty(connection: Connection) -> bool:
    settled = select(ADAPTERS.c.id).where(~_is(AdapterState.PENDING)).limit(1)
    return connection.scalar(settled) is None


def _is(state: AdapterState) -> ColumnElement[bool]:
    return ADAPTERS.c.state == state.value


def _active(connection: Connection, name: str) -> AdapterRecord | None:
    row = connection.execute(
        select(ADAPTERS).where(ADAPTERS.c.name == name, _is(AdapterState.ACTIVE))
    ).one_or_none()
    return None if row is None else to_record(row)


def _set_state(connection: Connection, adapter_id: int, state: AdapterState) -> AdapterRecord:
    changed = update(ADAPTERS).where(ADAPTERS.c.id == adapter_id).values(state=state.value)
    return to_record(connection.execute(changed.returning(ADAPTERS)).one())
