"""Keys as they are shown, by the server and by the command: all but the secret and its digest."""

from datetime import UTC, datetime

from manylora.adapters.keys import KeyRecord


def described(record: KeyRecord, used: int | None = None) -> dict[str, object]:
    """Return a key as JSON. ``used``: tokens of its budget; None: what the registry knows, which is never less."""
    terms = record.terms
    return {
        "object": "key",
        "id": record.id,
        "tenant": terms.tenant,
        "state": record.state(datetime.now(UTC)),
        "hint": f"…{record.hint}",
        "models": list(terms.models),
        "rights": sorted(right.value for right in terms.rights),
        "requests_per_minute": terms.requests_per_minute,
        "tokens_per_minute": terms.tokens_per_minute,
        "parallel": terms.parallel,
        "budget": terms.budget,
        "used": record.spent if used is None else used,
        "weight": terms.weight,
        "priority": terms.priority,
        "adapter_bytes": terms.adapter_bytes,
        "adapter_rows": terms.adapter_rows,
        "created": int(record.created_at.timestamp()),
        "expires": _seconds(terms.expires_at),
        "revoked": _seconds(record.revoked_at),
    }


def _seconds(time: datetime | None) -> int | None:
    return None if time is None else int(time.timestamp())
