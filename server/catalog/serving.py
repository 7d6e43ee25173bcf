"""Adapters of the catalog in the engine: given to it warm or cold, kept as asked, read again from the store.

Knows records and files, but no names in use: which record a name means is the catalog's.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from manylora.adapters.base_form import BaseForm
from manylora.adapters.errors import AdapterError
from manylora.adapters.reader import AdapterOutline
from manylora.adapters.records import AdapterRecord
from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.tokens import AdapterText
from manylora.adapters.types import AdapterWeights, FreedAdapter
from manylora.adapters.vocabulary import VOCABULARY
from manylora.server.catalog.intake import AdapterIntake, Prepared, reason_of
from manylora.server.catalog.types import AdapterEngine, CatalogObserver, Wishes
from manylora.server.errors import AdapterUnavailable

INHERITED = (
    "registered when a base was known by its config.json alone, so perhaps for other weights than these: delete it and"
    " register it again to say that it is for this base"
)


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One version of a name, as it is served at the moment."""

    record: AdapterRecord
    text: AdapterText
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Rank rows that it takes of each module; not known of one that is unavailable. Of VOCABULARY, if it was read."""
    reason: str | None = None
    """Why it is unavailable; the engine does not know it then."""
    trained_on: BaseForm | None = None
    """How its base was held in training, if it says so."""
    invocation: tuple[int, ...] = ()
    """Token ids from whose last occurrence in a prompt on it acts; (): it always does."""


def new_entry(record: AdapterRecord, prepared: Prepared) -> Entry:
    """Return what a name means once an adapter is served under it."""
    ranks = prepared.weights.rank_by_module()
    invocation = prepared.weights.invocation
    return Entry(record, prepared.text, ranks, trained_on=prepared.trained_on, invocation=invocation)


class Serving:
    """Between records and the engine. Lives on the event loop."""

    def __init__(
        self,
        engine: AdapterEngine,
        registry: AdapterRegistry,
        intake: AdapterIntake,
        observer: CatalogObserver,
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._intake = intake
        self._observer = observer
        self._files: dict[int, str] = {}
        """Digests of what the engine may read at any moment, by id."""

    def reads(self, digest: str) -> bool:
        """Return whether the engine may still read files of ``digest``."""
        return digest in self._files.values()

    async def hand_over(self, record: AdapterRecord, weights: AdapterWeights) -> None:
        """Give the engine an adapter that it doesn't know, with its weights."""
        with self._given(record):
            await self._engine.add_adapter(
                record.id,
                weights,
                load_from=self._loader(record),
                preload=record.preload,
                pinned=record.pinned,
            )

    async def take_back(self, record: AdapterRecord, *, abort: bool) -> FreedAdapter:
        """Have the engine let an adapter go, once running requests have ended or been aborted."""
        freed = await self._engine.remove_adapter(record.id, abort=abort)
        self._files.pop(record.id, None)
        return freed

    async def rest(self, record: AdapterRecord) -> None:
        """Have the engine keep an adapter on disk only, once running requests have ended, until it is asked for."""
        try:
            await self._engine.rest_adapter(record.id)
        except Exception as error:  # it is served all the same, and takes room until others need that
            self._observer.failed("rest", record.name, error)

    async def ready(self, record: AdapterRecord, *, pinned: bool, preload: bool) -> None:
        """Have the engine keep an adapter as the one was that it takes over from; without room, on disk."""
        weights = None
        try:
            if preload and self._engine.adapter_tier(record.id) == "disk":
                weights = await self._intake.work(self._loader(record))
            await self._engine.keep_adapter(record.id, weights, preload=preload, pinned=pinned)
        except AdapterUnavailable as error:
            self._observer.failed("preload", record.name, error)
            await self._engine.keep_adapter(record.id, None, preload=False, pinned=pinned)

    async def keep(self, record: AdapterRecord, wishes: Wishes) -> AdapterRecord:
        """Keep an adapter that the engine knows as ``wishes`` say; return its record. All of it or nothing.

        Raises AdapterUnavailable if it is to be preloaded and there is no room or its files are damaged.
        """
        wanted = wishes.of(record)
        preload_now = wishes.preload is True and self._engine.adapter_tier(record.id) != "device"
        if wanted == (record.preload, record.pinned) and not preload_now:
            return record
        weights = await self._intake.work(self._loader(record)) if preload_now else None
        preload, pinned = wanted
        await self._engine.keep_adapter(record.id, weights, preload=preload_now, pinned=pinned)
        try:
            return await asyncio.to_thread(self._registry.keep, record.id, pinned=pinned, preload=preload)
        except BaseException:
            await self._engine.keep_adapter(record.id, None, preload=False, pinned=record.pinned)
            raise

    async def restore(self, record: AdapterRecord, outline: AdapterOutline | str) -> Entry:
        """Make a record's adapter known again after a restart; ``outline`` may say why it can't be."""
        if isinstance(outline, str):
            return Entry(record, AdapterText(), reason=outline)
        try:
            warm = (record.preload or record.pinned) and await self._restore_warm(record)
            if not warm:
                await self._restore_cold(record, outline)
        except (AdapterError, OSError) as error:
            return Entry(record, AdapterText(), reason=reason_of(error))
        except AdapterUnavailable as error:
            return Entry(record, AdapterText(), reason=error.message)
        # What embedding and head take is known at most: copies of the base's take nothing, and then mix with any.
        ranks = {module: rank for module, rank in outline.rank_by_module().items() if module != VOCABULARY}
        invocation = outline.spec.invocation
        return Entry(record, outline.text, ranks, trained_on=outline.trained_on, invocation=invocation)

    async def _restore_warm(self, record: AdapterRecord) -> bool:
        weights = await self._intake.work(lambda: self._intake.read(record.digest))
        try:
            await self.hand_over(record, weights)
        except AdapterUnavailable as error:
            self._observer.failed("preload", record.name, error)  # it is served all the same, from disk
            return False
        return True

    async def _restore_cold(self, record: AdapterRecord, outline: AdapterOutline) -> None:
        load_from = self._loader(record)
        with self._given(record):
            await self._engine.add_adapter_cold(
                record.id,
                outline.rank_by_module(),
                load_from=load_from,
                pinned=record.pinned,
                invocation=outline.spec.invocation,
            )

    @contextlib.contextmanager
    def _given(self, record: AdapterRecord) -> Iterator[None]:
        """Note that the engine may read an adapter's files, unless it doesn't take it."""
        self._files[record.id] = record.digest
        try:
            yield
        except BaseException:
            del self._files[record.id]
            raise

    def _loader(self, record: AdapterRecord) -> Callable[[], AdapterWeights]:
        """Return what the engine calls, in a thread of its own, to read the weights again."""

        def load() -> AdapterWeights:
            try:
                return self._intake.read(record.digest)
            except (AdapterError, OSError) as error:
                message = f"adapter {record.name!r} can't be served: {reason_of(error)}"
                raise AdapterUnavailable(message) from error

        return load
