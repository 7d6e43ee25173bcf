"""What a tenant's adapters may take: bytes of files and rank rows, added up over its namespace.

Old versions count with their bytes: where there is no room for them, fewer are kept of the name that is changed.
Checked when new weights are known and before they are given to the engine; what is being put counts until it is there
or isn't. Lives on the event loop.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass

from manylora.adapters.lineage import Lineage
from manylora.adapters.records import AdapterState
from manylora.adapters.store import AdapterStore
from manylora.server.catalog.served import Served
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
        self, quota: Quota, name: str, served: Served, plan: Callable[[int], Lineage], keep: int
    ) -> AsyncIterator[int]:
        """Hold room for what ``name`` is to be, and give how many old versions of it there is room for.

        ``plan`` returns its versions with at most so many old ones; ``keep`` are wanted. Raises NamespaceFull.
        """
        sizes: dict[str, int] = {}
        # Others may have come in while sizes were read.
        while missing := {*_digests(plan(keep)), *_held(quota, served)} - sizes.keys():
            sizes |= await asyncio.to_thread(self._sizes, missing)
        claim = object()
        try:
            for fewer in range(keep, -1, -1):
                self._coming[claim] = name, *_size(plan(fewer), sizes)
                full = self._check(quota, name, served, sizes)
                if full is None:
                    break
            if full is not None:
                raise full
            yield fewer
        finally:
            del self._coming[claim]

    def _sizes(self, digests: set[str]) -> dict[str, int]:
        return {digest: self._store.nbytes(digest) for digest in digests}

    def _check(
        self, quota: Quota, name: str, served: Served, sizes: Mapping[str, int]
    ) -> NamespaceFull | None:
        """Add up what the namespace is to hold: what is there and isn't being replaced, and what is coming."""
        coming = [each for each in self._coming.values() if _is_of(quota, each[0])]
        replaced = {each[0] for each in coming}
        kept = [
            _size(lineage, sizes)
            for lineage in _lineages(quota, served)
            if lineage.active.name not in replaced
        ]
        rows = sum(rank for rank, _ in kept) + sum(rank for _, rank, _ in coming)
        nbytes = sum(size for _, size in kept) + sum(size for _, _, size in coming)
        for what, needed, most in (("rank rows", rows, quota.rows), ("bytes", nbytes, quota.nbytes)):
            if most is not None and needed > most:
                return NamespaceFull(
                    f"with {name!r} the adapters of {quota.tenant!r} would have {needed:,} {what}, at most {most:,} are"
                    " theirs: delete some first, or old versions of others",
                    param="name",
                )
        return None


def answering_rows(lineage: Lineage) -> int:
    """Return the rank rows of what answers requests for a name."""
    return sum(each.rank for each in lineage.records if each.state is not AdapterState.KEPT)


def _size(lineage: Lineage, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Return the rank rows of what answers requests for the name, and the bytes of all of its versions."""
    return answering_rows(lineage), sum(sizes[each.digest] for each in lineage.records)


def _digests(lineage: Lineage) -> Iterator[str]:
    return (each.digest for each in lineage.records)


def _held(quota: Quota, served: Served) -> Iterator[str]:
    return (digest for lineage in _lineages(quota, served) for digest in _digests(lineage))


def _lineages(quota: Quota, served: Served) -> Iterator[Lineage]:
    found = (served.lineage(name) for name in served.names() if _is_of(quota, name))
    return (each for each in found if each is not None)


def _is_of(quota: Quota, name: str) -> bool:
    return name.startswith(f"{quota.tenant}/")
