"""API keys: what one is made of, what it allows, and how it is told again without being kept.

A secret is 256 random bits behind a prefix that scanners of leaked secrets can look for; of it only the sha256 is kept.
A slow hash is for what people think up: nobody finds 256 random bits, and each request would pay for it.
"""

import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from manylora.adapters.errors import InvalidKey

PREFIX = "mlk_"
"""What every secret begins with."""
_RANDOM_BYTES = 32
_HINT = 4
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PATTERN = re.compile(r"[A-Za-z0-9._\-/:*?]{1,160}(@[1-9][0-9]{0,8})?")
MOST_PATTERNS = 256
MOST = 1 << 53
"""Largest number of a limit: every JSON reader keeps it whole."""
LIMITS = (
    "requests_per_minute",
    "tokens_per_minute",
    "parallel",
    "budget",
    "adapter_bytes",
    "adapter_rows",
    "expires_at",
)
"""Terms that a key may do without."""
MOST_WEIGHT, LEAST_WEIGHT = 1000.0, 0.001
MOST_PRIORITY = 1 << 31


class Right(Enum):
    """What a key may do."""

    INFER = "infer"
    """Ask models."""
    MANAGE = "manage"
    """Register, replace and delete adapters and mixtures in its tenant's namespace, ``tenant/…``."""
    ADMIN = "admin"
    """Everything: all adapters, exports, keys."""


@dataclass(frozen=True, slots=True)
class KeyTerms:
    """What a key allows. A limit of None is none. Raises InvalidKey when made of what makes no sense."""

    tenant: str
    """1 to 64 of ``A–Z a–z 0–9 . _ -``, the first a letter or a digit."""
    models: tuple[str, ...] = ("*",)
    """Patterns over names of the base, adapters and mixtures; ``name@3`` is that version alone."""
    rights: frozenset[Right] = frozenset({Right.INFER})
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    parallel: int | None = None
    """Requests under way at the same time."""
    budget: int | None = None
    """Tokens that it may ever use."""
    weight: float = 1.0
    """Turns that its tenant has in the queue for each of a tenant of weight 1."""
    priority: int = 0
    """The least, most urgent ``priority`` that its requests may ask for."""
    adapter_bytes: int | None = None
    """Bytes that the files of its tenant's adapters may have."""
    adapter_rows: int | None = None
    """Rank rows that its tenant's adapters may have, added up."""
    expires_at: datetime | None = None
    """UTC."""

    def __post_init__(self) -> None:
        if not _TENANT.fullmatch(self.tenant):
            raise InvalidKey(
                f"tenant {self.tenant[:100]!r}: a tenant's name is 1 to 64 letters, digits and . _ -, and begins with a"
                " letter or a digit"
            )
        if not self.rights:
            raise InvalidKey("a key without a right opens nothing: give infer, manage or admin")
        _check_patterns(self.models)
        for name in ("requests_per_minute", "tokens_per_minute", "parallel", "budget"):
            _check_limit(name, getattr(self, name), 1)
        for name in ("adapter_bytes", "adapter_rows"):
            _check_limit(name, getattr(self, name), 0)
        if not LEAST_WEIGHT <= self.weight <= MOST_WEIGHT:
            raise InvalidKey(f"weight is {self.weight:g}: give {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}")
        if not -MOST_PRIORITY <= self.priority < MOST_PRIORITY:
            raise InvalidKey(f"priority is {self.priority}: give a number of 32 bits")


@dataclass(frozen=True, slots=True)
class KeyChange:
    """What of a key's terms is to be others. Raises InvalidKey when made of what makes no sense."""

    given: Mapping[str, object]
    """Terms by name, as KeyTerms has them."""
    unlimited: Sequence[str] = ()
    """Names of LIMITS that it is to do without."""

    def __post_init__(self) -> None:
        for name in self.unlimited:
            if name not in LIMITS:
                raise InvalidKey(f"unlimited: {name[:100]!r} is no limit of a key: give {', '.join(LIMITS)}")
            if name in self.given:
                raise InvalidKey(f"{name} is given, and is to be unlimited: choose one of the two")
        if not self.given and not self.unlimited:
            raise InvalidKey("nothing is to be changed: give a term that is to be another")

    def of(self, terms: KeyTerms) -> KeyTerms:
        """Return the terms with the change. Raises InvalidKey."""
        changes: dict[str, Any] = {**self.given, **dict.fromkeys(self.unlimited)}
        return replace(terms, **changes)


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as the registry knows it."""

    id: str
    """``key-`` and 12 hex digits. No secret."""
    terms: KeyTerms
    hint: str
    """The secret's last characters, by which its holder knows it again."""
    digest: str
    """sha256 of the secret, 64 hex digits."""
    created_at: datetime
    """UTC, as the next two."""
    revoked_at: datetime | None = None
    spent: int = 0
    """Tokens of the budget that are used or lent out: never less than what was answered."""
    previous_digest: str | None = None
    previous_until: datetime | None = None
    """Until when the secret before the last rotation opens as well."""

    def state(self, now: datetime) -> str:
        """Return ``active``, ``expired`` or ``revoked``."""
        if self.revoked_at is not None:
            return "revoked"
        expires = self.terms.expires_at
        return "expired" if expires is not None and now >= expires else "active"


def new_secret() -> str:
    """Return a secret that nobody has had."""
    return PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)


def new_id() -> str:
    """Return a key's id."""
    return f"key-{secrets.token_hex(6)}"


def digest_of(secret: bytes) -> str:
    """Return what is kept of a secret."""
    return hashlib.sha256(secret).hexdigest()


def hint_of(secret: str) -> str:
    """Return what its holder knows a secret by."""
    return secret[-_HINT:]


def parse_rights(words: Sequence[str]) -> frozenset[Right]:
    """Return the rights of these names. Raises InvalidKey."""
    known = {right.value: right for right in Right}
    for word in words:
        if word not in known:
            raise InvalidKey(f"there is no right {word[:100]!r}: give {', '.join(known)}")
    return frozenset(known[word] for word in words)


def parse_terms(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return some of a key's terms, as JSON has them, as KeyTerms has them. Raises InvalidKey."""
    parsed = dict(given)
    if "models" in given:
        parsed["models"] = tuple(given["models"])
    if "rights" in given:
        parsed["rights"] = parse_rights(given["rights"])
    if given.get("expires_at") is not None:
        parsed["expires_at"] = _to_come(parse_time(given["expires_at"]))
    return parsed


def parse_time(text: str) -> datetime:
    """Return a time in UTC; one without a zone is meant so. Raises InvalidKey."""
    try:
        found = datetime.fromisoformat(text)
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError):
        raise InvalidKey(f"{text[:100]!r} is no time: write it as 2027-01-31 or 2027-01-31T12:00Z") from None


def _to_come(end: datetime) -> datetime:
    """Return a key's end. Raises InvalidKey if it is over: that key would open nothing."""
    now = datetime.now(UTC)
    if end <= now:
        raise InvalidKey(
            f"{end:%Y-%m-%dT%H:%MZ} is over, it is {now:%Y-%m-%dT%H:%MZ}: a key ends at a time to come (UTC, if no zone"
            " is given); one that is to end now is revoked"
        )
    return end


def _check_patterns(patterns: Sequence[str]) -> None:
    if not 1 <= len(patterns) <= MOST_PATTERNS:
        raise InvalidKey(f"a key has 1 to {MOST_PATTERNS} patterns of models; this one has {len(patterns)}")
    for pattern in patterns:
        if not _PATTERN.fullmatch(pattern):
            raise InvalidKey(
                f"pattern {pattern[:100]!r}: a pattern is a name in which * stands for any characters and ? for one;"
                " @3 behind it means version 3 alone"
            )


def _check_limit(name: str, value: int | None, least: int) -> None:
    if value is not None and not least <= value <= MOST:
        raise InvalidKey(f"{name} is {value}: give {least} to {MOST}, or nothing for no limit")
