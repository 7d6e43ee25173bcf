"""Keys as they change on the disk, and who their callers are then."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from manylora.adapters.keys import KeyChange, KeyRecord, KeyTerms, digest_of
from manylora.server.tenants.ring import KeyRing


class Store:
    """Keys in memory; whoever writes moves the stamp."""

    def __init__(self, *records: KeyRecord) -> None:
        self.records = {record.id: record for record in records}
        self.writes = 0

    def change(self, key_id: str, **changes: object) -> None:
        self.records[key_id] = replace(self.records[key_id], **changes)  # type: ignore[arg-type]
        self.writes += 1

    def all(self) -> list[KeyRecord]:
        return list(self.records.values())

    def stamp(self) -> object:
        return self.writes

    def note_spent(self, spent: dict[str, int]) -> None:
        for key_id, tokens in spent.items():
            self.change(key_id, spent=tokens)

    def create(self, terms: KeyTerms) -> tuple[KeyRecord, str]:
        raise NotImplementedError

    def revoke(self, key_id: str) -> KeyRecord:
        self.change(key_id, revoked_at=datetime.now(UTC))
        return self.records[key_id]

    def set_terms(self, key_id: str, change: KeyChange) -> KeyRecord:
        self.change(key_id, terms=change.of(self.records[key_id].terms))
        return self.records[key_id]

    def rotate(self, key_id: str, overlap: timedelta) -> tuple[KeyRecord, str]:
        raise NotImplementedError


def key(name: str, **terms: object) -> KeyRecord:
    made = KeyTerms(**{"tenant": "acme", "budget": 10_000, **terms})  # type: ignore[arg-type]
    return KeyRecord(name, made, name[-4:], digest_of(name.encode()), datetime.now(UTC))


async def test_a_loan_makes_no_caller_anew_and_other_terms_do() -> None:
    """A key's patterns are compiled once, not each time that a budget is lent out of."""
    store = Store(key("one", models=("a*",) * 256), key("two"))
    ring = KeyRing(store)
    await ring.load()
    before = ring.caller_named("one"), ring.caller_named("two")
    assert not isinstance(before[1], str)
    assert before[1].account is not None
    await ring.reserve(before[1].account.enter(0.0), 10)
    assert store.records["two"].spent > 0
    await ring.load()
    after = ring.caller_named("one"), ring.caller_named("two")
    assert after[0] is before[0]
    assert after[1] is before[1]
    store.change("one", terms=replace(store.records["one"].terms, models=("b",)))
    await ring.load()
    changed = ring.caller_named("one")
    assert not isinstance(changed, str)
    assert (changed.may_use("b"), changed.may_use("a1")) == (True, False)
    assert ring.caller_named("two") is before[1]
    await ring.revoke("two")
    assert isinstance(ring.caller_named("two"), str)
