"""The registry's tables as they are now, and the records that their rows become.

What they were before is told by adapters/migrations: a change here needs a migration there.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    select,
    text,
)

from manylora.adapters.mixtures import MixturePart


class AdapterState(Enum):
    """Where a record is in its life: pending → active or canary ↔ kept → retired."""

    PENDING = "pending"
    ACTIVE = "active"
    CANARY = "canary"
    """Gets a share of the requests for its name."""
    KEPT = "kept"
    """May be asked for by its number, and gone back to."""
    RETIRED = "retired"


IN_SERVICE = (AdapterState.ACTIVE, AdapterState.CANARY, AdapterState.KEPT)


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One version of one name."""

    id: int
    """From 1 up; never used again, also not by another name."""
    name: str
    version: int
    """From 1 up within the name; goes on counting after a delete."""
    digest: str
    source: str
    """Where the client said it was."""
    rank: int
    """The largest rank of its modules."""
    targets: tuple[str, ...]
    pinned: bool
    preload: bool
    created_at: datetime
    """UTC."""
    state: AdapterState
    before: int | None = None
    """The version that it took over from, as long as that is in service."""
    share: float | None = None
    """A canary's, of the requests for the name."""


@dataclass(frozen=True, slots=True)
class MixtureRecord:
    """One version of a mixture's name."""

    id: int
    """From 1 up, in a sequence of the mixtures' own; never used again."""
    name: str
    version: int
    """From 1 up within the mixtures of that name; goes on counting after a delete."""
    parts: tuple[MixturePart, ...]
    """In the order given. Which versions the names mean is found when a request begins."""
    created_at: datetime
    """UTC."""


METADATA = MetaData()
ADAPTERS = Table(
    "adapters",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("name", String, nullable=False),
    Column("version", Integer, nullable=False),
    Column("digest", String, nullable=False),
    Column("source", String, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("targets", String, nullable=False),
    Column("pinned", Boolean, nullable=False),
    Column("preload", Boolean, nullable=False),
    Column("created_at", String, nullable=False),
    Column("state", String, nullable=False),
    Index("one_active_per_name", "name", unique=True, sqlite_where=text("state = 'active'")),
    Index("by_name", "name"),
    Index("one_canary_per_name", "name", unique=True, sqlite_where=text("state = 'canary'")),
    sqlite_autoincrement=True,
)
VERSIONS = Table(
    "versions",
    METADATA,
    Column("adapter", Integer, primary_key=True),
    Column("before", Integer),
    Column("share", Float),
)
"""What else is known of an adapter's row, if there is anything: ``before``, a version of the same name that is in
service, and a canary's ``share``."""
IDENTITY = Table(
    "identity",
    METADATA,
    Column("id", String, nullable=False),
    Column("used", Boolean, nullable=False),
)
"""One row: what the store knows its registry by, and whether any adapter was ever active."""
MIXTURES = Table(
    "mixtures",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("name", String, nullable=False),
    Column("version", Integer, nullable=False),
    Column("parts", String, nullable=False),
    Column("created_at", String, nullable=False),
    Column("state", String, nullable=False),
    Index("one_active_mixture_per_name", "name", unique=True, sqlite_where=text("state = 'active'")),
    Index("mixtures_by_name", "name"),
    sqlite_autoincrement=True,
)
"""``parts`` is JSON, a list of {"adapter": name, "weight": number}: it is written and read whole, and the names are
looked up at each request, so no row refers to another. A row is active or retired."""

KEYS = Table(
    "keys",
    METADATA,
    Column("id", String, primary_key=True),
    Column("tenant", String, nullable=False),
    Column("digest", String, nullable=False),
    Column("hint", String, nullable=False),
    Column("models", String, nullable=False),
    Column("rights", String, nullable=False),
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("parallel", BigInteger),
    Column("budget", BigInteger),
    Column("spent", BigInteger, nullable=False),
    Column("weight", Float, nullable=False),
    Column("priority", BigInteger, nullable=False),
    Column("adapter_bytes", BigInteger),
    Column("adapter_rows", BigInteger),
    Column("created_at", String, nullable=False),
    Column("expires_at", String),
    Column("revoked_at", String),
    Column("previous_digest", String),
    Column("previous_until", String),
    Index("keys_by_digest", "digest", unique=True),
)
"""``models`` is a JSON list of patterns, ``rights`` words between spaces, times are UTC. No row holds a secret."""


RECORDS = select(ADAPTERS, VERSIONS.c.before, VERSIONS.c.share).join_from(
    ADAPTERS, VERSIONS, ADAPTERS.c.id == VERSIONS.c.adapter, isouter=True
)
"""What ``to_record`` makes a record of."""


def to_record(row: Row[tuple[object, ...]]) -> AdapterRecord:
    """Return the record in a row of RECORDS."""
    fields = row._mapping
    return AdapterRecord(
        id=fields["id"],
        name=fields["name"],
        version=fields["version"],
        digest=fields["digest"],
        source=fields["source"],
        rank=fields["rank"],
        targets=tuple(fields["targets"].split("\n")),
        pinned=fields["pinned"],
        preload=fields["preload"],
        created_at=datetime.fromisoformat(fields["created_at"]),
        state=AdapterState(fields["state"]),
        before=fields["before"],
        share=fields["share"],
    )


def to_mixture(row: Row[tuple[object, ...]]) -> MixtureRecord:
    """Return the record in a row of MIXTURES."""
    fields = row._mapping
    parts = json.loads(fields["parts"])
    return MixtureRecord(
        id=fields["id"],
        name=fields["name"],
        version=fields["version"],
        parts=tuple(MixturePart(part["adapter"], part["weight"]) for part in parts),
        created_at=datetime.fromisoformat(fields["created_at"]),
    )


def written_parts(parts: Sequence[MixturePart]) -> str:
    """Return what the column ``parts`` holds for these. Raises ValueError for a weight that is not finite."""
    return json.dumps([{"adapter": part.adapter, "weight": part.weight} for part in parts], allow_nan=False)
