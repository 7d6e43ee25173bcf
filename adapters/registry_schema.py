"""Which tables a registry's file has, and how they become today's: adapters/migrations, run by alembic.

schema 1   adapters                       until 0.1.0; without a number
schema 2   + identity                     0.1.0; without a number
schema 3   + mixtures                     the number is in alembic_version, as in all that follow
schema 4   + keys
schema 5   + versions
"""

import contextlib
import errno
import logging
import shutil
import sqlite3
import tempfile
import threading
from pathlib import Path

from sqlalchemy import Connection, create_engine
from sqlalchemy.exc import DBAPIError

from manylora.adapters.durable import put_in_place
from manylora.adapters.errors import RegistryNewer, StoreFull
from manylora.adapters.ownership import DirectoryLock
from manylora.adapters.records import ADAPTERS, IDENTITY

SCHEMAS = ("1", "2", "3", "4", "5")
"""All that this version knows, in order."""
NEWEST = SCHEMAS[-1]
_VERSION_TABLE = "alembic_version"
_SCRIPTS = Path(__file__).parent / "migrations"
_ONE_AT_A_TIME = threading.Lock()
"""What a migration runs in is one for the whole process: alembic.op."""

log = logging.getLogger(__name__)


def refuse_newer(path: Path) -> None:
    """Raise RegistryNewer if a newer version wrote the file at ``path``. Looks at a copy: SQLite changes what it opens.

    For the file's only user. If the copy can't be made or read, ``bring_up`` says what is wrong.
    """
    with contextlib.suppress(OSError, DBAPIError), tempfile.TemporaryDirectory() as room:
        copy = Path(room) / path.name
        for suffix in ("", "-wal"):
            if (source := path.with_name(path.name + suffix)).is_file():
                shutil.copyfile(source, copy.with_name(copy.name + suffix))
        engine = create_engine(f"sqlite:///{copy}")
        try:
            with engine.connect() as connection:
                found = _schema(connection)
        finally:
            engine.dispose()
        _check_known(found, path)


def bring_up(connection: Connection, path: Path, *, owned: bool) -> None:
    """Give the file at ``path`` today's tables within the transaction of ``connection``; a new file gets them, too.

    A copy of what was is put beside it first. ``owned``: the caller holds the directory's lock, which is taken here
    otherwise, since an older server may be using these tables. Raises RegistryNewer, StoreFull, DirectoryInUse.
    """
    found = _schema(connection)
    if found == NEWEST:
        return
    _check_known(found, path)
    if found is None:
        _migrate(connection, None)
        return
    with contextlib.ExitStack() as held:
        if not owned:
            held.callback(DirectoryLock(path.parent).release)
        copy = path.with_name(f"{path.name}.schema-{found}")
        _copy_whole(path, copy)
        _migrate(connection, found)
    log.info("the adapter registry goes from schema %s to %s; how it was is in %s", found, NEWEST, copy)


def _schema(connection: Connection) -> str | None:
    """Return which schema the tables are of; None: there are none yet."""
    tables = set(connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'").scalars())
    if _VERSION_TABLE in tables:
        return str(connection.exec_driver_sql(f"SELECT version_num FROM {_VERSION_TABLE}").scalar())
    if ADAPTERS.name not in tables:
        return None
    return "2" if IDENTITY.name in tables else "1"


def _check_known(found: str | None, path: Path) -> None:
    if found is not None and found not in SCHEMAS:
        raise RegistryNewer(
            f"a newer version of manylora wrote the adapter registry {path} (schema {found[:20]}, this one knows up to"
            f" {NEWEST}): run that version, or put back the copy {path.name}.schema-{NEWEST} that it kept"
        )


def _copy_whole(path: Path, copy: Path) -> None:
    """Copy what is committed in the database to ``copy``: all of it or, if that is cut short, what was there before."""
    partial = copy.with_name(f".{copy.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        with contextlib.closing(sqlite3.connect(path)) as source:
            # One file that needs no log: backup's would come with one, and it takes more room to make.
            source.execute("VACUUM INTO ?", (str(partial),)).close()
        shutil.copymode(path, partial)
        put_in_place(partial, copy)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull("the disk of the adapter registry is full; make room") from error
        raise
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _migrate(connection: Connection, found: str | None) -> None:
    # A quarter of a second that only a start with other tables has to spend.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_SCRIPTS).replace("%", "%%"))
    config.attributes["connection"] = connection
    with _ONE_AT_A_TIME:
        if found is not None:
            command.stamp(config, found)
        command.upgrade(config, NEWEST)
