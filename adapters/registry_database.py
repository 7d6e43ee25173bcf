"""The registry's file: connections, transactions, patience, the space kept for a full disk. Knows no adapter.

Opening it brings its tables to what this version knows (registry_schema), in one transaction.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection, create_engine, event
from sqlalchemy.exc import DBAPIError, IntegrityError

from manylora.adapters.errors import (
    AdapterError,
    AdapterNameTaken,
    RegistryBusy,
    RegistryFault,
    StoreFull,
)
from manylora.adapters.ownership import DirectoryLock
from manylora.adapters.registry_schema import bring_up, refuse_newer
from manylora.adapters.reserve import Reserve

Result = TypeVar("Result")


class RegistryDatabase:
    """The SQLite file at ``path``, made if need be; any thread may use it. Raises what ``transaction`` raises."""

    def __init__(
        self,
        path: Path,
        *,
        lock_wait_ms: int,
        reserve: Reserve | None,
        lock: DirectoryLock | None,
        prepare: Callable[[Connection], None],
    ) -> None:
        """``prepare`` is called at the end of the transaction that opens the file. The rest is AdapterRegistry's.

        Raises RegistryNewer, and with ``lock`` leaves the files as they are, if a newer version wrote them.
        """
        self._path = path
        self._lock = lock
        self._space = reserve or Reserve(path.with_name(f"{path.name}.reserve"))
        if lock is not None:
            # Who shares the file doesn't open it but through SQLite: closing it would end SQLite's locks on it.
            refuse_newer(path)
        self.engine = create_engine(f"sqlite:///{path}")
        # SQLite makes waiters poll and some of them starve; threads of this process queue up here instead.
        self._turn = threading.Lock()

        @event.listens_for(self.engine, "connect")
        def _configure(connection: sqlite3.Connection, _record: object) -> None:
            connection.isolation_level = None  # or the driver opens transactions of its own, and too late
            connection.execute(f"PRAGMA busy_timeout = {lock_wait_ms:d}")
            connection.execute("PRAGMA journal_mode = WAL").close()

        @event.listens_for(self.engine, "begin")
        def _begin(connection: Connection) -> None:
            # A read that turns into a write can't wait for a lock in SQLite; taking it first can.
            connection.exec_driver_sql("BEGIN IMMEDIATE")

        try:
            with self.transaction() as connection:
                _check_whole(connection, path)
                bring_up(connection, path, owned=lock is not None)
                prepare(connection)
        except BaseException:
            self.engine.dispose()
            raise
        self.keep_space()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Everything in the block, or nothing. Raises StoreFull, RegistryBusy, AdapterNameTaken, RegistryFault."""
        try:
            with self._turn, self.engine.begin() as connection:
                yield connection
        except (DBAPIError, sqlite3.Error) as error:
            raise _translated(error) from error

    def on_a_full_disk_too(self, end: Callable[[Connection], Result]) -> Result:
        """Run what ends a record in a transaction; if the disk is full, in the space that is kept for that."""
        try:
            with self.transaction() as connection:
                return end(connection)
        except StoreFull:
            if not self._space.give_up():
                raise
        try:
            with self.transaction() as connection:
                return end(connection)
        finally:
            # What the log of changes took of the reserve comes back with it, and the reserve is whole again.
            self._shorten_log()
            self.keep_space()

    def keep_space(self) -> None:
        """Take the space for deleting on a full disk, as far as it can be had."""
        if self._path.is_file():  # a database in memory has no disk to fill
            self._space.hold()

    def close(self) -> None:
        """Close all connections, and let another process have the directory."""
        self.engine.dispose()
        if self._lock is not None:
            self._lock.release()

    def _shorten_log(self) -> None:
        with contextlib.suppress(DBAPIError), self._turn, self.engine.connect() as connection:
            # Not in a transaction, where SQLite allows none.
            raw = connection.connection.driver_connection
            assert isinstance(raw, sqlite3.Connection)
            raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").close()


def _check_whole(connection: Connection, path: Path) -> None:
    """Raise RegistryFault if a page of the file is damaged: SQLite says so only once somebody needs that page."""
    found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
    if found != "ok":
        raise RegistryFault(f"the adapter registry {path} is damaged ({found}): put a copy of it back")


def _translated(error: DBAPIError | sqlite3.Error) -> AdapterError:
    orig = error.orig if isinstance(error, DBAPIError) else error
    cause = str(orig)
    # Without room for the index of its log SQLite says that the disk fails.
    if "full" in cause or getattr(orig, "sqlite_errorname", "") == "SQLITE_IOERR_SHMSIZE":
        return StoreFull("the disk of the adapter registry is full; make room")
    if "locked" in cause or "busy" in cause:
        return RegistryBusy("the adapter registry is locked by another process; try again")
    if isinstance(error, IntegrityError) and "UNIQUE" in cause:
        return AdapterNameTaken("another adapter took that name at the same moment; try again")
    return RegistryFault(f"the adapter registry can't be used: {cause}")
