"""A name's versions as rows of the registry: found whole, and written as a change made them. Within a transaction."""

from dataclasses import replace
from itertools import groupby

from sqlalchemy import Connection, delete, update
from sqlalchemy.dialects.sqlite import insert

from manylora.adapters.lineage import Lineage
from manylora.adapters.records import (
    ADAPTERS,
    IN_SERVICE,
    RECORDS,
    VERSIONS,
    AdapterRecord,
    AdapterState,
    to_record,
)

_IN_SERVICE = ADAPTERS.c.state.in_([state.value for state in IN_SERVICE])


def find_lineage(connection: Connection, name: str) -> Lineage | None:
    """Return the versions of ``name`` that are in service; None: there are none."""
    rows = connection.execute(RECORDS.where(ADAPTERS.c.name == name, _IN_SERVICE))
    records = tuple(to_record(row) for row in rows)
    return Lineage(records) if records else None


def all_lineages(connection: Connection) -> list[Lineage]:
    """Return those of all names, in the order of these."""
    rows = connection.execute(RECORDS.where(_IN_SERVICE).order_by(ADAPTERS.c.name, ADAPTERS.c.id))
    return [Lineage(tuple(records)) for _, records in groupby(map(to_record, rows), lambda each: each.name)]


def begin(connection: Connection, record: AdapterRecord) -> Lineage:
    """Make a pending record the first version of its name."""
    made = replace(record, state=AdapterState.ACTIVE)
    _write_record(connection, made)
    return Lineage((made,))


def write(connection: Connection, before: Lineage, after: Lineage) -> Lineage:
    """Write what has changed between the two; what is not in ``after`` is retired. Returns ``after``."""
    known = {each.id: each for each in before.records}
    for gone in known.keys() - {each.id for each in after.records}:
        _write_record(connection, replace(known[gone], state=AdapterState.RETIRED, share=None, before=None))
    changed = [each for each in after.records if known.get(each.id) != each]
    # A name has one active version and one canary at every moment: who leaves such a place leaves it first.
    places = [AdapterState.KEPT, AdapterState.CANARY, AdapterState.ACTIVE]
    for record in sorted(changed, key=lambda each: places.index(each.state)):
        _write_record(connection, record)
    return after


def end_all(connection: Connection, lineage: Lineage) -> None:
    """Retire every version."""
    for record in lineage.records:
        _write_record(connection, replace(record, state=AdapterState.RETIRED, share=None, before=None))


def _write_record(connection: Connection, record: AdapterRecord) -> None:
    row = {"state": record.state.value, "pinned": record.pinned, "preload": record.preload}
    connection.execute(update(ADAPTERS).where(ADAPTERS.c.id == record.id).values(row))
    _write_more(connection, record)


def _write_more(connection: Connection, record: AdapterRecord) -> None:
    """Write what the table of versions says of a record."""
    more = {"before": record.before, "share": record.share}
    if record.state is AdapterState.RETIRED or not any(value is not None for value in more.values()):
        # No row says that as well, and what ends must not take room on a full disk.
        connection.execute(delete(VERSIONS).where(VERSIONS.c.adapter == record.id))
        return
    written = insert(VERSIONS).values(adapter=record.id, **more)
    connection.execute(written.on_conflict_do_update(index_elements=[VERSIONS.c.adapter], set_=more))
