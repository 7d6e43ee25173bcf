"""The keys of a running server: secrets to callers, accounts that outlive requests, budgets lent out in time.

All keys are held in memory, and read again when the registry's file has changed: another process may have made or
revoked one. What is written goes through a thread: the event loop and the engine's steps never wait for the disk.
"""

import asyncio
import contextlib
import hmac
import time
from collections.abc import AsyncIterator, Collection
from datetime import UTC, datetime, timedelta
from typing import Protocol

from manylora.adapters.keys import KeyChange, KeyRecord, KeyTerms, Right, digest_of
from manylora.server.tenants.access import Access
from manylora.server.tenants.account import Account, Reservation, Ticket
from manylora.server.tenants.caller import Caller

POLL_SECONDS = 1.0
"""How soon a key is known, or known to be revoked, that another process has written."""


class KeyStore(Protocol):
    """The part of manylora.adapters.key_registry.KeyRegistry that is needed here. Methods but ``stamp`` block."""

    def create(self, terms: KeyTerms) -> tuple[KeyRecord, str]:
        """Return a new key and its secret."""
        ...

    def all(self) -> list[KeyRecord]:
        """Return every key there ever was."""
        ...

    def revoke(self, key_id: str) -> KeyRecord:
        """End a key."""
        ...

    def set_terms(self, key_id: str, change: KeyChange) -> KeyRecord:
        """Have a key allow something else."""
        ...

    def rotate(self, key_id: str, overlap: timedelta) -> tuple[KeyRecord, str]:
        """Give a key another secret."""
        ...

    def note_spent(self, spent: dict[str, int]) -> None:
        """Write down what of budgets is gone."""
        ...

    def stamp(self) -> object:
        """Return what changes whenever anybody has written."""
        ...


class KeyRing:
    """Lives on the event loop. ``load`` before use, ``follow`` beside the server, ``close`` at its end."""

    def __init__(self, store: KeyStore) -> None:
        self._store = store
        self._stamp: object = None
        self._records: dict[str, KeyRecord] = {}
        self._by_digest: dict[str, KeyRecord] = {}
        self._accounts: dict[str, Account] = {}
        self._callers: dict[str, Caller] = {}
        self._tenants: frozenset[str] = frozenset()
        self._writing = asyncio.Lock()
        self._reading = asyncio.Lock()

    @property
    def has_keys(self) -> bool:
        """Whether there ever was a key: then nobody may ask without one, also when all are revoked."""
        return bool(self._records)

    @property
    def tenants(self) -> Collection[str]:
        """All tenants that there ever was a key of: whose namespaces are nobody else's."""
        return self._tenants

    def records(self) -> list[KeyRecord]:
        """Return every key, oldest first."""
        return list(self._records.values())

    def used(self, key_id: str) -> int:
        """Return how many tokens of its budget a key has used."""
        account = self._accounts.get(key_id)
        return 0 if account is None else account.used

    async def load(self) -> None:
        """Read the keys, if anybody has written since they were read."""
        async with self._reading:
            stamp = self._store.stamp()
            if stamp != self._stamp:
                records = await asyncio.to_thread(self._store.all)
                # Of before: what is written while it is read is read again.
                self._stamp = stamp
                self._take(records)

    async def caller_of(self, secret: bytes) -> Caller | str | None:
        """Return whose secret that is; a sentence: of a key that opens no more; None: nobody's."""
        found = self._find(secret)
        if found is None:
            await self.load()  # it may have been made a moment ago
            found = self._find(secret)
        if found is None:
            return None
        return self._opened(found)

    def id_of(self, secret: bytes) -> str | None:
        """Return the id of the key whose secret that is or was, whether it opens or not; None: nobody's."""
        found = self._by_digest.get(digest_of(secret))
        return None if found is None else found.id

    def caller_named(self, key_id: str) -> Caller | str:
        """Return whose key has that id; a sentence: it opens no more."""
        found = self._records.get(key_id)
        return "the API key is gone" if found is None else self._opened(found)

    async def reserve(self, ticket: Ticket, tokens: int) -> Reservation:
        """Reserve tokens for a request, and see that its budget's loan is on the disk first.

        Raises RateLimited, QuotaExhausted, and what the registry raises: then nothing is reserved.
        """
        account = ticket.account
        # Who can't have them needs no loan.
        account.check_tokens(tokens, time.monotonic())
        while account.loan_for(tokens) is not None:
            async with self._writing:
                loan = account.loan_for(tokens)
                if loan is not None:
                    key_id = next(key for key, each in self._accounts.items() if each is account)
                    await asyncio.to_thread(self._store.note_spent, {key_id: loan})
                    account.lent = loan
        return ticket.reserve(tokens, time.monotonic())

    async def create(self, terms: KeyTerms) -> tuple[KeyRecord, str]:
        """Make a key; return it and its secret."""
        made = await asyncio.to_thread(self._store.create, terms)
        await self._reload()
        return made

    async def revoke(self, key_id: str) -> KeyRecord:
        """End a key, for requests that come now; those under way go on. Raises UnknownKey."""
        record = await asyncio.to_thread(self._store.revoke, key_id)
        await self._reload()
        return record

    async def set_terms(self, key_id: str, change: KeyChange) -> KeyRecord:
        """Have a key allow something else, from the next request that it sends. Raises UnknownKey and InvalidKey."""
        record = await asyncio.to_thread(self._store.set_terms, key_id, change)
        await self._reload()
        return record

    async def rotate(self, key_id: str, overlap: timedelta) -> tuple[KeyRecord, str]:
        """Give a key another secret. Raises UnknownKey."""
        rotated = await asyncio.to_thread(self._store.rotate, key_id, overlap)
        await self._reload()
        return rotated

    @contextlib.asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        """Notice within the ``async with`` what other processes write; at its end, take unused loans back."""
        following = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            following.cancel()
            await self.close()

    async def close(self) -> None:
        """Write down what was used of what was lent."""
        gone = {key: each.used for key, each in self._accounts.items() if each.lent > each.used}
        if gone:
            async with self._writing:
                await asyncio.to_thread(self._store.note_spent, gone)
            for key, used in gone.items():
                self._accounts[key].lent = used

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(POLL_SECONDS)
            with contextlib.suppress(Exception):  # a registry that is locked: the keys stay as they are known
                await self.load()

    async def _reload(self) -> None:
        self._stamp = None
        await self.load()

    def _take(self, records: list[KeyRecord]) -> None:
        before = {key: each.terms for key, each in self._records.items()}
        self._records = {record.id: record for record in records}
        self._tenants = frozenset(record.terms.tenant for record in records)
        self._by_digest = {record.digest: record for record in records}
        self._by_digest |= {each.previous_digest: each for each in records if each.previous_digest}
        for record in records:
            account = self._accounts.get(record.id)
            if account is None:
                self._accounts[record.id] = Account(record.terms, record.spent)
            elif account.terms != record.terms:
                account.change(record.terms)
        # Each loan of a budget is a change: compiling all keys' patterns then would hold the loop.
        self._callers = {
            each.id: self._callers[each.id] if before.get(each.id) == each.terms else self._caller(each)
            for each in records
        }

    def _caller(self, record: KeyRecord) -> Caller:
        terms = record.terms
        account = self._accounts[record.id]
        if Right.ADMIN in terms.rights:
            access = None
        else:
            access = Access(
                terms.tenant,
                terms.models,
                manages=Right.MANAGE in terms.rights,
                tenants=lambda: self._tenants,
            )
        return Caller(record.id, terms.rights, terms.tenant, access, account, terms.weight, terms.priority)

    def _opened(self, key: KeyRecord) -> Caller | str:
        state = key.state(datetime.now(UTC))
        if state != "active":
            return f"the API key {'has expired' if state == 'expired' else 'is revoked'}"
        return self._callers[key.id]

    def _find(self, secret: bytes) -> KeyRecord | None:
        # A look-up's time may tell of digests, and nobody can choose a secret by its digest.
        digest = digest_of(secret)
        found = self._by_digest.get(digest)
        if found is None or hmac.compare_digest(digest, found.digest):
            return found
        until = found.previous_until
        return found if until is not None and datetime.now(UTC) < until else None
