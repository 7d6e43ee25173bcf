"""What names mean while a server runs: the base, adapters and mixtures, and who sees which of them. Changes nothing.

Lives on the event loop. How names come to mean something is the catalog's own side (server/catalog/catalog.py).
"""

from collections.abc import Callable, Sequence
from copy import copy
from typing import Literal, Self

from manylora.adapters.errors import UnknownAdapter
from manylora.adapters.lineage import unknown_version
from manylora.adapters.mixtures import MixturePart
from manylora.adapters.names import LONGEST_ECHO, list_names, split_version
from manylora.server.catalog.mixtures import Mixtures
from manylora.server.catalog.seen import Sees
from manylora.server.catalog.served import Served
from manylora.server.catalog.serving import INHERITED, Entry
from manylora.server.catalog.types import (
    AdapterEngine,
    CatalogEntry,
    CatalogSettings,
    Described,
    MixtureEntry,
    ResolvedModel,
    ResolvedPart,
    label_of,
)
from manylora.server.catalog.usage import Usage
from manylora.server.errors import AdapterUnavailable

Kind = Literal["base", "adapter", "mixture"]
"""What a name may mean."""


class KnownNames:
    """The side of an AdapterCatalog that is asked."""

    _mixtures: Mixtures

    def __init__(
        self, engine: AdapterEngine, settings: CatalogSettings, nbytes_of: Callable[[str], int]
    ) -> None:
        """``nbytes_of`` says how large the files of a digest are."""
        self._bases = frozenset(settings.base_names)
        self._served = Served()
        self._tier_of = engine.adapter_tier
        self._inherited_up_to = settings.inherited_up_to
        self._note_on = settings.note_on
        self._nbytes_of = nbytes_of
        self.usage = Usage()

    def seen_by(self, sees: Sees) -> Self:
        """Return the catalog as whoever may use only what ``sees`` lets through finds it, errors' lists included.

        A mixture is there for those who may use its name and each of its parts. Names that are taken stay taken.
        """
        seen = copy(self)
        seen._served = self._served.seen_by(sees)
        seen._bases = frozenset(name for name in self._bases if sees(name, None))
        seen._mixtures = self._mixtures.seen_by(sees, seen._served, seen._bases)
        return seen

    def resolve(
        self, model: str, parts: Sequence[MixturePart] = (), *, asker: str | None = None
    ) -> ResolvedModel:
        """Return what ``model`` in a request means, or the mixture of ``parts`` on the base that it names.

        ``asker`` stands for who asks: of a name with a canary, the same one gets the same version. None: the active
        version is meant, as it is in mixtures. A dictionary look-up for a name. Raises ModelNotFound with names or
        versions that exist, AdapterUnavailable with the reason, and InvalidMixture; InvalidRequest for ``parts``
        beside anything but the base.
        """
        if parts:
            return self._mixtures.beside(model, parts)
        if model in self._bases:
            return ResolvedModel((), model, label_of(model))
        entry = self._served.find(model)
        if entry is None:
            return self._mixtures.resolve(model)
        if asker is not None and model == entry.record.name:
            entry = self._served.for_asker(entry, asker)
        if entry.reason is not None:
            raise AdapterUnavailable(f"adapter {model!r} can't be served: {entry.reason}", param="model")
        record = entry.record
        itself = ResolvedPart(record.id, record.name, record.version, 1.0)
        return ResolvedModel(
            ((record.id, 1.0),),
            model,
            label_of(record.name),
            text=entry.text,
            digest=record.digest,
            poolings=entry.text.poolings,
            itself=itself,
        )

    def kind_of(self, name: str) -> Kind | None:
        """Return what has this name, whether it can be served or not."""
        if name in self._bases:
            return "base"
        if name in self._served.active:
            return "adapter"
        return "mixture" if name in self._mixtures.names else None

    def get(self, name: str) -> CatalogEntry:
        """Return one adapter, or the version of it that ``name`` asks for. Raises UnknownAdapter, UnknownVersion."""
        entry = self._served.find(name)
        if entry is not None:
            return self._show(entry)
        asked = split_version(name)
        if asked is not None and (versions := self._served.versions(asked[0])):
            raise unknown_version(*asked, (each.record.version for each in versions))
        return self._show(self._existing(name))

    def versions(self, name: str) -> tuple[CatalogEntry, ...]:
        """Return all versions of an adapter, the newest first. Raises UnknownAdapter."""
        self._existing(name)
        return tuple(map(self._show, self._served.versions(name)))

    def notes_on(self, name: str) -> tuple[str, ...]:
        """Return what the owner of an adapter should know; nothing of what isn't there any more."""
        entry = self._served.active.get(name)
        return () if entry is None else self._show(entry).notes

    def list(self) -> tuple[CatalogEntry, ...]:
        """Return all adapters in order of their names."""
        return tuple(self._show(entry) for _, entry in sorted(self._served.active.items()))

    def described(self) -> tuple[Described, ...]:
        """Return the adapters that can be served and what they say of themselves, in order of their names."""
        return tuple(
            Described(name, entry.text.manifest)
            for name, entry in sorted(self._served.active.items())
            if entry.reason is None
        )

    def mixtures(self) -> tuple[MixtureEntry, ...]:
        """Return all named mixtures in order of their names."""
        return self._mixtures.entries()

    def get_mixture(self, name: str) -> MixtureEntry | None:
        """Return one named mixture, and what its parts are now."""
        return self._mixtures.entry(name)

    def _existing(self, name: str) -> Entry:
        entry = self._served.active.get(name)
        if entry is None:
            asked = name[:LONGEST_ECHO]
            if name in self._mixtures.names:
                raise UnknownAdapter(
                    f"{asked!r} is a mixture, which this is not for: name one of its adapters"
                )
            raise UnknownAdapter(
                f"there is no adapter {asked!r}; adapters: {list_names(self._served.active)}"
            )
        return entry

    def _show(self, entry: Entry) -> CatalogEntry:
        record = entry.record
        tier = None if entry.reason is not None else self._tier_of(record.id)
        canary = self._served.canary(record.name)
        return CatalogEntry(
            record,
            tier,
            entry.reason,
            INHERITED if record.id <= self._inherited_up_to else None,
            self._note_on(entry.trained_on),
            self._nbytes_of(record.digest),
            self.usage.of(record.id),
            None if canary is None else canary.record,
            tuple(each.record.version for each in self._served.versions(record.name)),
            entry.invocation,
            entry.text.manifest,
        )
