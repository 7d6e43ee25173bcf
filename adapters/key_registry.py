"""The keys' side of the registry: made, looked up, revoked, rotated, and what of their budgets is spent.

A row outlives its key, so that what was revoked stays known, and a server that once had keys is not open again. Methods
block and may be called from any thread, and beside a running server: it reads again what has changed.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import Connection, Row, insert, select, update

from manylora.adapters.errors import UnknownKey
from manylora.adapters.keys import (
    KeyChange,
    KeyRecord,
    KeyTerms,
    digest_of,
    hint_of,
    new_id,
    new_secret,
    parse_rights,
)
from manylora.adapters.records import KEYS
from manylora.adapters.registry_database import RegistryDatabase

PRIVATE = 0o600


class KeyRegistry:
    """The keys of an AdapterRegistry."""

    def __init__(self, database: RegistryDatabase, path: Path) -> None:
        self._database = database
        self._path = path

    def create(self, terms: KeyTerms) -> tuple[KeyRecord, str]:
        """Return a new key and its secret, which is told this once."""
        secret = new_secret()
        with self._database.transaction() as connection:
            row = insert(KEYS).values(
                id=new_id(),
                hint=hint_of(secret),
                digest=digest_of(secret.encode()),
                created_at=datetime.now(UTC).isoformat(),
                spent=0,
                **_columns(terms),
            )
            record = _record(connection.execute(row.returning(KEYS)).one())
        self._keep_to_owner()
        return record, secret

    def all(self) -> list[KeyRecord]:
        """Return every key there ever was, oldest first."""
        with self._database.transaction() as connection:
            rows = connection.execute(select(KEYS).order_by(KEYS.c.created_at, KEYS.c.id))
            return [_record(row) for row in rows]

    def revoke(self, key_id: str) -> KeyRecord:
        """End a key; one that has ended stays as it is. Raises UnknownKey."""

        def end(connection: Connection) -> KeyRecord:
            found = _existing(connection, key_id)
            if found.revoked_at is not None:
                return found
            return _change(connection, key_id, {"revoked_at": datetime.now(UTC).isoformat()})

        return self._database.on_a_full_disk_too(end)

    def set_terms(self, key_id: str, change: KeyChange) -> KeyRecord:
        """Have a key allow something else; what it has used stays used. Raises UnknownKey and InvalidKey."""
        with self._database.transaction() as connection:
            found = _in_force(connection, key_id)
            return _change(connection, key_id, _columns(change.of(found.terms)))

    def rotate(self, key_id: str, overlap: timedelta) -> tuple[KeyRecord, str]:
        """Give a key another secret; the one before opens for ``overlap`` more. Raises UnknownKey."""
        secret = new_secret()
        with self._database.transaction() as connection:
            found = _in_force(connection, key_id)
            until = datetime.now(UTC) + overlap
            changes = {
                "digest": digest_of(secret.encode()),
                "hint": hint_of(secret),
                "previous_digest": found.digest if overlap else None,
                "previous_until": until.isoformat() if overlap else None,
            }
            return _change(connection, key_id, changes), secret

    def note_spent(self, spent: Mapping[str, int]) -> None:
        """Write down how much of these keys' budgets is used or lent out; on the disk when it returns."""
        with self._database.transaction() as connection:
            for key_id, tokens in spent.items():
                connection.execute(update(KEYS).where(KEYS.c.id == key_id).values(spent=tokens))

    def stamp(self) -> tuple[tuple[int, int], ...]:
        """Return what changes whenever anybody has written to the registry; cheap, and without a lock."""
        found = []
        for suffix in ("", "-wal"):
            try:
                state = self._path.with_name(self._path.name + suffix).stat()
                found.append((state.st_mtime_ns, state.st_size))
            except OSError:
                found.append((0, 0))
        return tuple(found)

    def _keep_to_owner(self) -> None:
        """Let nobody else read the file: digests open nothing, but tell who has keys."""
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.chmod(self._path.with_name(self._path.name + suffix), PRIVATE)


def _existing(connection: Connection, key_id: str) -> KeyRecord:
    row = connection.execute(select(KEYS).where(KEYS.c.id == key_id)).one_or_none()
    if row is None:
        raise UnknownKey(f"there is no key {key_id[:100]!r}")
    return _record(row)


def _in_force(connection: Connection, key_id: str) -> KeyRecord:
    found = _existing(connection, key_id)
    if found.revoked_at is not None:
        raise UnknownKey(f"key {key_id} is revoked: create another one")
    return found


def _change(connection: Connection, key_id: str, values: Mapping[str, object]) -> KeyRecord:
    changed = update(KEYS).where(KEYS.c.id == key_id).values(**values)
    return _record(connection.execute(changed.returning(KEYS)).one())


def _columns(terms: KeyTerms) -> dict[str, object]:
    return {
        "tenant": terms.tenant,
        "models": json.dumps(terms.models),
        "rights": " ".join(sorted(right.value for right in terms.rights)),
        "requests_per_minute": terms.requests_per_minute,
        "tokens_per_minute": terms.tokens_per_minute,
        "parallel": terms.parallel,
        "budget": terms.budget,
        "weight": terms.weight,
        "priority": terms.priority,
        "adapter_bytes": terms.adapter_bytes,
        "adapter_rows": terms.adapter_rows,
        "expires_at": None if terms.expires_at is None else terms.expires_at.isoformat(),
    }


def _time(value: str | None) -> datetime | None:
    return None if value is None else datetime.fromisoformat(value)


def _record(row: Row[tuple[object, ...]]) -> KeyRecord:
    fields = row._mapping
    terms = KeyTerms(
        tenant=fields["tenant"],
        models=tuple(json.loads(fields["models"])),
        rights=parse_rights(fields["rights"].split()),
        requests_per_minute=fields["requests_per_minute"],
        tokens_per_minute=fields["tokens_per_minute"],
        parallel=fields["parallel"],
        budget=fields["budget"],
        weight=fields["weight"],
        priority=fields["priority"],
        adapter_bytes=fields["adapter_bytes"],
        adapter_rows=fields["adapter_rows"],
        expires_at=_time(fields["expires_at"]),
    )
    return KeyRecord(
        id=fields["id"],
        terms=terms,
        hint=fields["hint"],
        digest=fields["digest"],
        created_at=datetime.fromisoformat(fields["created_at"]),
        revoked_at=_time(fields["revoked_at"]),
        spent=fields["spent"],
        previous_digest=fields["previous_digest"],
        previous_until=_time(fields["previous_until"]),
    )
