"""The tables of files, batches and answered lines, in SQLite. All methods block; any thread may call.

A line's answer is there once, for good, as soon as ``add_result`` returns: whatever a crash leaves, it is not asked
again, and one that isn't there is.
"""

import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from manylora.adapters.errors import RegistryFault, StoreFull
from manylora.server.batches.records import Batch, BatchError, Counts, StoredFile, Usage

_TABLES = """
CREATE TABLE IF NOT EXISTS files (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL,
    created_at INTEGER NOT NULL, nbytes INTEGER NOT NULL, filename TEXT NOT NULL, purpose TEXT NOT NULL,
    expires_at INTEGER);
CREATE INDEX IF NOT EXISTS files_by_owner ON files (owner, number);
CREATE TABLE IF NOT EXISTS batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, is_over INTEGER NOT NULL,
    record TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS batches_by_owner ON batches (owner, number);
CREATE TABLE IF NOT EXISTS results (
    batch TEXT NOT NULL, line INTEGER NOT NULL, good INTEGER NOT NULL, text TEXT NOT NULL,
    prompt INTEGER NOT NULL, completion INTEGER NOT NULL, cached INTEGER NOT NULL,
    PRIMARY KEY (batch, line)) WITHOUT ROWID;
"""
_FILE = "id, owner, created_at, nbytes, filename, purpose, expires_at"


class BatchDatabase:
    """The file at ``path``, made if need be. Raises StoreFull and RegistryFault."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        with self._transaction() as connection:
            for statement in _TABLES.split(";"):
                connection.execute(statement)
        self._connection.execute("PRAGMA journal_mode = WAL").close()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    # Files

    def add_file(self, file: StoredFile) -> None:
        """Make a file known."""
        with self._transaction() as connection:
            _insert_file(connection, file)

    def file(self, file_id: str) -> StoredFile | None:
        """Return a file."""
        with self._transaction() as connection:
            row = connection.execute(f"SELECT {_FILE} FROM files WHERE id = ?", (file_id,)).fetchone()
        return None if row is None else StoredFile(*row)

    def files(
        self, owner: str, purpose: str | None, after: str | None, limit: int, now: int, *, ascending: bool
    ) -> list[StoredFile]:
        """Return some of an owner's files, in the order in which they were made or the other way round.

        None is among them whose time is over ``now``.
        """
        sign, order = (">", "ASC") if ascending else ("<", "DESC")
        query = f"SELECT {_FILE} FROM files WHERE owner = ? AND (expires_at IS NULL OR expires_at > ?)"
        given: list[object] = [owner, now]
        if purpose is not None:
            query, given = f"{query} AND purpose = ?", [*given, purpose]
        if after is not None:
            query = f"{query} AND number {sign} (SELECT number FROM files WHERE id = ?)"
            given.append(after)
        with self._transaction() as connection:
            rows = connection.execute(f"{query} ORDER BY number {order} LIMIT ?", [*given, limit]).fetchall()
        return [StoredFile(*row) for row in rows]

    def file_ids(self) -> set[str]:
        """Return the ids of all files."""
        with self._transaction() as connection:
            return {row[0] for row in connection.execute("SELECT id FROM files")}

    def expired_files(self, now: int) -> list[str]:
        """Return the files whose time is over."""
        with self._transaction() as connection:
            return [r[0] for r in connection.execute("SELECT id FROM files WHERE expires_at <= ?", (now,))]

    def bytes_held(self) -> dict[str, int]:
        """Return how large each owner's files are together."""
        with self._transaction() as connection:
            rows = connection.execute("SELECT owner, sum(nbytes) FROM files GROUP BY owner")
            return {owner: int(nbytes) for owner, nbytes in rows}

    def delete_file(self, file_id: str) -> bool:
        """Forget a file; whether there was one."""
        with self._transaction() as connection:
            return connection.execute("DELETE FROM files WHERE id = ?", (file_id,)).rowcount > 0

    # Batches

    def add_batch(self, batch: Batch) -> None:
        """Keep a new batch."""
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO batches (id, owner, is_over, record) VALUES (?, ?, ?, ?)",
                (batch.id, batch.owner, batch.is_over, _written(batch)),
            )

    def put_batch(self, batch: Batch, files: tuple[StoredFile, ...] = ()) -> bool:
        """Keep what a batch is now, and the files that it made; of one that is over the results go.

        False: it was over before, and stays as it was.
        """
        with self._transaction() as connection:
            kept = connection.execute(
                "UPDATE batches SET record = ?, is_over = ? WHERE id = ? AND NOT is_over",
                (_written(batch), batch.is_over, batch.id),
            )
            if not kept.rowcount:
                return False
            for file in files:
                _insert_file(connection, file)
            if batch.is_over:
                connection.execute("DELETE FROM results WHERE batch = ?", (batch.id,))
            return True

    def batch(self, batch_id: str) -> Batch | None:
        """Return a batch."""
        with self._transaction() as connection:
            row = connection.execute("SELECT record FROM batches WHERE id = ?", (batch_id,)).fetchone()
        return None if row is None else _read(row[0])

    def batches(self, owner: str, after: str | None, limit: int) -> list[Batch]:
        """Return some of an owner's batches, the newest first."""
        query, given = "SELECT record FROM batches WHERE owner = ?", [owner]
        if after is not None:
            query, given = f"{query} AND number < (SELECT number FROM batches WHERE id = ?)", [owner, after]
        with self._transaction() as connection:
            rows = connection.execute(f"{query} ORDER BY number DESC LIMIT ?", [*given, limit]).fetchall()
        return [_read(row[0]) for row in rows]

    def unfinished(self) -> list[Batch]:
        """Return the batches that are not over, oldest first."""
        with self._transaction() as connection:
            rows = connection.execute("SELECT record FROM batches WHERE NOT is_over ORDER BY number")
            return [_read(row[0]) for row in rows]

    # Results

    def add_result(self, batch_id: str, line: int, text: str, usage: Usage, *, good: bool) -> bool:
        """Keep the answer of a line; whether it had none."""
        with self._transaction() as connection:
            done = connection.execute(
                "INSERT OR IGNORE INTO results VALUES (?, ?, ?, ?, ?, ?, ?)",
                (batch_id, line, good, text, usage.prompt, usage.completion, usage.cached),
            )
            return done.rowcount > 0

    def add_unanswered(self, batch_id: str, told: Sequence[tuple[int, str]]) -> None:
        """Keep (line, text) of lines that get no answer, those that have one excepted."""
        with self._transaction() as connection:
            connection.executemany(
                "INSERT OR IGNORE INTO results VALUES (?, ?, 0, ?, 0, 0, 0)",
                [(batch_id, line, text) for line, text in told],
            )

    def answered(self, batch_id: str) -> set[int]:
        """Return the lines that have an answer."""
        with self._transaction() as connection:
            rows = connection.execute("SELECT line FROM results WHERE batch = ?", (batch_id,))
            return {row[0] for row in rows}

    def totals(self, batch_id: str) -> tuple[Counts, Usage]:
        """Return how many lines were answered, well or not, and their tokens."""
        query = (
            "SELECT coalesce(sum(good), 0), count(*), coalesce(sum(prompt), 0), coalesce(sum(completion), 0), "
            "coalesce(sum(cached), 0) FROM results WHERE batch = ?"
        )
        with self._transaction() as connection:
            good, count, prompt, completion, cached = connection.execute(query, (batch_id,)).fetchone()
        return Counts(0, good, count - good), Usage(prompt, completion, cached)

    def results(self, batch_id: str, *, good: bool) -> Iterator[str]:
        """Yield the answers that are good, or the others, in the order of the lines."""
        last = -1
        while True:
            with self._transaction() as connection:
                rows = connection.execute(
                    "SELECT line, text FROM results WHERE batch = ? AND good = ? AND line > ? ORDER BY line LIMIT 100",
                    (batch_id, good, last),
                ).fetchall()
            if not rows:
                return
            yield from (row[1] for row in rows)
            last = rows[-1][0]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            with self._lock:
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield self._connection
                    self._connection.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
        except sqlite3.Error as error:
            if "full" in str(error):
                raise StoreFull("the disk of files and batches is full; make room") from error
            raise RegistryFault(f"the table of files and batches can't be used: {error}") from error


def _insert_file(connection: sqlite3.Connection, file: StoredFile) -> None:
    given = (
        file.id,
        file.owner,
        file.created_at,
        file.nbytes,
        file.filename,
        file.purpose,
        file.expires_at,
    )
    connection.execute(f"INSERT INTO files ({_FILE}) VALUES (?, ?, ?, ?, ?, ?, ?)", given)


def _written(batch: Batch) -> str:
    return json.dumps(asdict(batch))


def _read(record: str) -> Batch:
    kept = json.loads(record)
    kept["errors"] = tuple(BatchError(**each) for each in kept["errors"])
    return Batch(**{**kept, "counts": Counts(**kept["counts"]), "usage": Usage(**kept["usage"])})
