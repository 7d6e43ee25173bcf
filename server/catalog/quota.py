"""What a tenant's adapters may take: bytes of files and rank rows, added up over its namespace.

Checked when new weights are known and before they are given to the engine; what is being put counts until it is there
or isn't. Lives on the event loop.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass

from manylora.adapters.store import AdapterStore
from manylora.server.catalog.intake import Prepared
from manylora.server.catalog.serving import Entry
from manylora.server.errors import NamespaceFull


@dataclass(frozen=True, slots=True)
class Quota:
    """How much a namespace may hold. None: no limit."""

    tenant: str
    rows: int | None = None
    nbytes: int | None = None


class Quotas:
    """What namespaces hold, and what is on its way into them."""

    def __init__(self, store: AdapterStore) -> None:
        self._store = store
        self._coming: dict[object, tuple[str, int, int]] = {}
        """Name, rows and bytes of what is being put."""

    @contextlib.asynccontextmanager
    async def claimed(
        self, quota: Quota, name: str, entries: Mapping[str, Entry], prepared: Prepared
    ) -> AsyncIterator[None]:
        """Hold room for weights that are put under ``name``, in the place of what it has. Raises NamespaceFull."""
        sizes: dict[str, int] = {}
        # Others may have come in while sizes were read.
        while missing := {prepared.digest, *_digests(quota, entries)} - sizes.keys():
            sizes |= await asyncio.to_thread(self._sizes, missing)
        claim = object()
        self._coming[claim] = name, prepared.rank, sizes[prepared.digest]
        try:
            self._check(quota, name, entries, sizes)
            yield
        finally:
            del self._coming[claim]

    def _sizes(self, digests: set[str]) -> dict[str, int]:
        return {digest: self._store.nbytes(digest) for digest in digests}

    def _check(self, quota: Quota, name: str, entries: Mapping[str, Entry], sizes: Mapping[str, int]) -> None:
        """Add up what the namespace is to hold: what is there and isn't being replaced, and what is coming."""
        coming = [each for each in self._coming.values() if _is_of(quota, each[0])]
        replaced = {each[0] for each in coming}
        held = [entry.record for other, entry in entries.items() if _is_of(quota, other)]
        kept = [(each.rank, sizes[each.digest]) for each in held if each.name not in replaced]
        rows = sum(rank for rank, _ in kept) + sum(rank for _, rank, _ in coming)
        nbytes = sum(size for _, size in kept) + sum(size for _, _, size in coming)
        for what, needed, most in (("rank rows", rows, quota.rows), ("bytes", nbytes, quota.nbytes)):
            if most is not None and needed > most:
                raise NamespaceFull(
                    f"with {name!r} the adapters of {quota.tenant!r} would have {needed:,} {what}, at most {most:,} are"
                    " theirs: delete some first",
                    param="name",
                )


def _digests(quota: Quota, entries: Mapping[str, Entry]) -> Iterator[str]:
    return (entry.record.digest for name, entry in entries.items() if _is_of(quota, name))


def _is_of(quota: Quota, name: str) -> bool:
    return name.startswith(f"{quota.tenant}/")
