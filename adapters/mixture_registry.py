"""Names, versions and parts of mixtures in the registry. Whether the parts exist is not asked here.

A name belongs to one adapter or one mixture: both sides look at the other's table in the transaction that takes a name.
"""

from collections.abc import Collection, Sequence
from datetime import UTC, datetime

from sqlalchemy import Connection, func, insert, select, update

from manylora.adapters.errors import AdapterNameTaken, UnknownAdapter
from manylora.adapters.mixtures import MixturePart, are_same
from manylora.adapters.names import check_name, list_names
from manylora.adapters.records import (
    ADAPTERS,
    MIXTURES,
    AdapterState,
    MixtureRecord,
    to_mixture,
    written_parts,
)
from manylora.adapters.registry_database import RegistryDatabase

_ACTIVE = MIXTURES.c.state == AdapterState.ACTIVE.value


class MixtureRegistry:
    """The mixtures of an AdapterRegistry. All methods block and may be called from any thread."""

    def __init__(self, database: RegistryDatabase, reserved: Collection[str]) -> None:
        self._database = database
        self._reserved = reserved

    def create(self, name: str, parts: Sequence[MixturePart]) -> MixtureRecord:
        """Return the active record of ``name``: the one that has these parts (in any order), else a new one.

        Raises AdapterNameTaken if other parts or an adapter have the name, InvalidAdapter for a bad name.
        """
        check_name(name, reserved=self._reserved)
        with self._database.transaction() as connection:
            found = _find(connection, name)
            if found is None:
                return _activate(connection, name, parts)
            if not are_same(found.parts, parts):
                raise AdapterNameTaken(
                    f"mixture {name!r} exists with other parts; replace it or choose another name"
                )
            return found

    def replace(self, name: str, parts: Sequence[MixturePart]) -> MixtureRecord:
        """Return the active record of ``name`` with these parts in this order: a version on, unless it has them now.

        Raises UnknownAdapter if no mixture has the name.
        """
        with self._database.transaction() as connection:
            found = _existing(connection, name)
            if found.parts == tuple(parts):
                return found
            _retire(connection, found)
            return _activate(connection, name, parts)

    def retire(self, name: str) -> MixtureRecord:
        """End the active record of ``name`` and return it. Raises UnknownAdapter. Works on a full disk."""

        def end(connection: Connection) -> MixtureRecord:
            found = _existing(connection, name)
            _retire(connection, found)
            return found

        return self._database.on_a_full_disk_too(end)

    def active(self) -> list[MixtureRecord]:
        """Return all active records in order of their names."""
        with self._database.transaction() as connection:
            rows = connection.execute(select(MIXTURES).where(_ACTIVE).order_by(MIXTURES.c.name))
            return [to_mixture(row) for row in rows]


def check_no_mixture(connection: Connection, name: str) -> None:
    """Raise AdapterNameTaken if a mixture has ``name``. For the transaction in which an adapter takes it."""
    if _find(connection, name) is not None:
        raise AdapterNameTaken(f"{name!r} is the name of a mixture; delete that or choose another name")


def _find(connection: Connection, name: str) -> MixtureRecord | None:
    row = connection.execute(select(MIXTURES).where(MIXTURES.c.name == name, _ACTIVE)).one_or_none()
    return None if row is None else to_mixture(row)


def _existing(connection: Connection, name: str) -> MixtureRecord:
    found = _find(connection, name)
    if found is None:
        names = connection.scalars(select(MIXTURES.c.name).where(_ACTIVE))
        raise UnknownAdapter(f"there is no mixture {name!r}; mixtures: {list_names(names)}")
    return found


def _activate(connection: Connection, name: str, parts: Sequence[MixturePart]) -> MixtureRecord:
    adapter = select(ADAPTERS.c.id).where(
        ADAPTERS.c.name == name, ADAPTERS.c.state == AdapterState.ACTIVE.value
    )
    if connection.scalar(adapter) is not None:
        raise AdapterNameTaken(f"{name!r} is the name of an adapter; delete that or choose another name")
    last = select(func.max(MIXTURES.c.version)).where(MIXTURES.c.name == name)
    row = insert(MIXTURES).values(
        name=name,
        version=(connection.scalar(last) or 0) + 1,
        parts=written_parts(parts),
        created_at=datetime.now(UTC).isoformat(),
        state=AdapterState.ACTIVE.value,
    )
    return to_mixture(connection.execute(row.returning(MIXTURES)).one())


def _retire(connection: Connection, record: MixtureRecord) -> None:
    connection.execute(
        update(MIXTURES).where(MIXTURES.c.id == record.id).values(state=AdapterState.RETIRED.value)
    )
