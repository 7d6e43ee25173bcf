"""Mixtures in the catalog: what adapters with weights mean together, and the names that some of them have.

A mixture owns nothing. Its parts' names are looked up at each request, so it follows them as they are replaced, go and
come back; a request keeps the ids that it began with. Lives on the event loop.
"""

import asyncio
import contextlib
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, MutableMapping, Sequence
from copy import copy

from manylora.adapters.errors import AdapterNameTaken, InvalidMixture, UnknownAdapter
from manylora.adapters.mixtures import (
    LONGEST_PART,
    MixturePart,
    are_same,
    check_parts,
    is_mixture,
    parse_mixture,
    part_weight,
    spell,
)
from manylora.adapters.names import LONGEST_ECHO, check_name, list_names, split_version, without_version
from manylora.adapters.records import MixtureRecord
from manylora.adapters.registry import AdapterRegistry
from manylora.adapters.tokens import PartText
from manylora.server.catalog.blend import Found, blended
from manylora.server.catalog.intake import KeyedLocks
from manylora.server.catalog.operations import Caller, Operations
from manylora.server.catalog.seen import Seen, Sees
from manylora.server.catalog.served import Served
from manylora.server.catalog.serving import Entry
from manylora.server.catalog.types import (
    MIXTURE_LABEL,
    CatalogSettings,
    MixtureEntry,
    ResolvedModel,
    ResolvedPart,
    label_of,
)
from manylora.server.catalog.usage import Usage
from manylora.server.errors import (
    AdapterUnavailable,
    InvalidRequest,
    ModelNotFound,
    NamespaceFull,
    ServerError,
)

_MOST_COMPARED = 4096
MOST_OF_TENANT = 1000
"""Mixtures in a tenant's namespace: they take no rank rows and no files, which its quota bounds."""
Admission = Callable[[MixtureRecord | None, Sequence[MixturePart]], bool]
"""Says whether the mixture that a name means now is the one wanted; raises if the name may not mean that one."""


class Mixtures:
    """Named mixtures, and what any mixture means. ``served`` are the catalog's adapters, as they come and go."""

    def __init__(
        self,
        registry: AdapterRegistry,
        settings: CatalogSettings,
        served: Served,
        names: KeyedLocks,
        operations: Operations,
        usage: Usage,
    ) -> None:
        """``names`` are the locks that adapters' operations hold too: a name means one thing."""
        self._registry = registry
        self._settings = settings
        self._served = served
        self._names = names
        self._operations = operations
        self._usage = usage
        self._bases: Collection[str] = settings.base_names
        self._records: MutableMapping[str, MixtureRecord] = {}
        self._tenant: str | None = None
        """Whose namespace is filled; None: the operator's, who has no bounds."""
        self._coming: set[str] = set()
        """Names that are being given."""
        self._compared: dict[Hashable, str | None] = {}
        """Names and digests of named mixtures' parts: in what their tokenizers differ; None: in nothing."""

    def seen_by(self, sees: Sees, served: Served, bases: Collection[str]) -> "Mixtures":
        """Return them as AdapterCatalog.seen_by says; ``served`` and ``bases`` are what is seen of those."""

        def is_seen(part: str) -> bool:
            if served.find(part) is not None:
                return True
            # What isn't there is nobody's: who may use its name may know of it.
            return self._served.find(part) is None and sees(*(split_version(part) or (part, None)))

        seen = copy(self)
        seen._served, seen._bases = served, bases
        seen._records = Seen(
            self._records,
            lambda name, record: (
                sees(name, record.version) and all(is_seen(part) for part in _names(record.parts))
            ),
        )
        return seen

    def below(self, tenant: str) -> "Mixtures":
        """Return them as a tenant fills its namespace."""
        managed = copy(self)
        managed._tenant = tenant
        return managed

    # What is asked

    @property
    def names(self) -> Collection[str]:
        """Names of mixtures."""
        return self._records.keys()

    def resolve(self, model: str) -> ResolvedModel:
        """Return what a name means that is neither the base's nor an adapter's: a named mixture, or one that it spells.

        Raises ModelNotFound for a model or a part that is not there, AdapterUnavailable for a part that can't be served
        and for a named mixture that can't, and InvalidMixture.
        """
        record = self._records.get(model)
        if record is None:
            if not is_mixture(model, self._knows):
                names = list_names([*self._bases, *self._served.active, *self._records])
                asked = model[:LONGEST_ECHO]
                told = self._versions_of(model) or f"models: {names}"
                raise ModelNotFound(f"model {asked!r} does not exist; {told}", param="model")
            return self._mixed(model, MIXTURE_LABEL, self._parse(model), "model")
        try:
            return self._mixed(model, label_of(model), record.parts)
        except (InvalidMixture, ModelNotFound, AdapterUnavailable) as error:
            message = f"mixture {model!r} can't be served: {error.message}"
            raise AdapterUnavailable(message, param="model") from error

    def beside(self, model: str, parts: Sequence[MixturePart]) -> ResolvedModel:
        """Return what ``parts`` mean beside ``model``. Raises InvalidRequest unless that is the base, else as above."""
        if model not in self._bases:
            asked, bases = model[:LONGEST_ECHO], list_names(self._bases)
            raise InvalidRequest(
                f"model is {asked!r}, but beside 'adapters' it names the base, {bases}: give every part in 'adapters'",
                param="adapters",
            )
        return self._mixed(model, MIXTURE_LABEL, parts, "adapters")

    def entries(self) -> tuple[MixtureEntry, ...]:
        """Return all named mixtures in order of their names."""
        return tuple(self._show(record) for _, record in sorted(self._records.items()))

    def entry(self, name: str) -> MixtureEntry | None:
        """Return one named mixture; None: no mixture has that name."""
        record = self._records.get(name)
        return None if record is None else self._show(record)

    def check_free(self, name: str) -> None:
        """Raise AdapterNameTaken if a mixture has that name: an adapter can't have it too."""
        if name in self._records:
            raise AdapterNameTaken(f"{name!r} is a mixture; delete it or choose another name for the adapter")

    # Operations, one after the other per name

    async def register(self, name: str, parts: Sequence[MixturePart]) -> tuple[MixtureEntry, bool]:
        """Serve the mixture of ``parts`` as ``name``; return it and whether it is new.

        The same parts again are the same mixture, whether it can be served now or not. Raises AdapterNameTaken for
        other parts or an adapter's name, InvalidAdapter for a name that none may have, InvalidMixture, ModelNotFound
        or AdapterUnavailable for a part, what the registry raises, and ShuttingDown.
        """

        def free_or_the_same(old: MixtureRecord | None, wanted: Sequence[MixturePart]) -> bool:
            if old is not None and not are_same(old.parts, wanted):
                raise AdapterNameTaken(
                    f"mixture {name!r} exists as {spell(old.parts)}; replace it or choose another name"
                )
            return old is not None

        return await self._run_set(name, parts, free_or_the_same)

    async def replace(self, name: str, parts: Sequence[MixturePart]) -> MixtureEntry:
        """Serve the mixture of ``parts`` as ``name`` from now on; running requests finish on what they began with.

        Raises what ``put`` raises, and UnknownAdapter for a name of no mixture.
        """

        def in_use(old: MixtureRecord | None, wanted: Sequence[MixturePart]) -> bool:
            if old is None:
                raise self._unknown(name)
            return old.parts == wanted

        return (await self._run_set(name, parts, in_use))[0]

    async def put(self, name: str, parts: Sequence[MixturePart]) -> tuple[MixtureEntry, bool]:
        """Serve the mixture of ``parts`` as ``name``, whatever mixture had the name; return whether it is new.

        Raises what ``register`` raises, but AdapterNameTaken for an adapter's name only.
        """
        return await self._run_set(name, parts, lambda old, wanted: old is not None and old.parts == wanted)

    async def delete(self, name: str) -> MixtureRecord:
        """Take a name out of service. It answers until the registry has let it go. Raises UnknownAdapter."""
        return await self._operations.run(lambda caller: self._delete(caller, name))

    async def restore(self) -> tuple[MixtureEntry, ...]:
        """Bring back what the registry knows, once the adapters are back."""
        records = await asyncio.to_thread(self._registry.mixtures.active)
        self._records.update((record.name, record) for record in records)
        self.follow()
        return self.entries()

    def follow(self, name: str | None = None) -> None:
        """Find out in the background which mixtures of that adapter are tokenised alike, now that it is another.

        None: those of all. What differs is unavailable, and says so before anybody asks.
        """
        records = [
            record
            for record in self._whole.values()
            if name is None or name in map(without_version, _names(record.parts))
        ]
        if records:
            self._operations.spawn(self._compare(records))

    async def _run_set(
        self, name: str, parts: Sequence[MixturePart], admit: Admission
    ) -> tuple[MixtureEntry, bool]:
        check_name(name, reserved=self._settings.base_names)
        rounded = tuple(MixturePart(part.adapter, part_weight(part.adapter, part.weight)) for part in parts)
        return await self._operations.run(lambda caller: self._set(caller, name, rounded, admit))

    async def _set(
        self, caller: Caller, name: str, parts: tuple[MixturePart, ...], admit: Admission
    ) -> tuple[MixtureEntry, bool]:
        async with self._names.hold(name):
            if name in self._served.names():
                raise AdapterNameTaken(f"{name!r} is an adapter; choose another name for the mixture")
            old = self._records.get(name)
            if admit(old, parts) and old is not None:
                return self._show(old), False
            await self._settings.check_alike(self._mixed(name, name, parts).part_texts)
            caller.check()
            mixtures = self._registry.mixtures
            write = mixtures.create if old is None else mixtures.replace
            with self._room_for(name):
                self._records[name] = record = await asyncio.to_thread(write, name, parts)
        return self._show(record), True

    @contextlib.contextmanager
    def _room_for(self, name: str) -> Iterator[None]:
        """Hold a place in the tenant's namespace, unless the name has one. Raises NamespaceFull."""
        if self._tenant is not None:
            begin = f"{self._tenant}/"
            there = {each for each in (*self._whole, *self._coming) if each.startswith(begin)}
            if name not in there and len(there) >= MOST_OF_TENANT:
                raise NamespaceFull(
                    f"{self._tenant!r} has {len(there):,} mixtures, at most {MOST_OF_TENANT:,} are theirs: delete some"
                    " first",
                    param="name",
                )
        self._coming.add(name)
        try:
            yield
        finally:
            self._coming.discard(name)

    @property
    def _whole(self) -> Mapping[str, MixtureRecord]:
        """All of them, whoever looks."""
        return self._records.whole if isinstance(self._records, Seen) else self._records

    async def _delete(self, caller: Caller, name: str) -> MixtureRecord:
        async with self._names.hold(name):
            caller.check()
            if name not in self._records:
                raise self._unknown(name)
            record = await asyncio.to_thread(self._registry.mixtures.retire, name)
            del self._records[name]
            self._usage.forget(name)
        return record

    async def _compare(self, records: Sequence[MixtureRecord]) -> None:
        """Compare what parts' tokens are made with, where that wasn't done: a tokenizer takes a second to load."""
        for record in records:
            with contextlib.suppress(
                InvalidMixture, ServerError
            ):  # it is unavailable, or its next request is told
                texts = self._blended(record.name, record.name, record.parts).part_texts
                if texts and _digests(texts) not in self._compared:
                    self._compared[_digests(texts)] = await self._difference(texts)
        while len(self._compared) > _MOST_COMPARED:
            del self._compared[next(iter(self._compared))]

    async def _difference(self, texts: Sequence[PartText]) -> str | None:
        try:
            await self._settings.check_alike(texts)
        except InvalidMixture as error:
            return error.message
        return None

    # What parts mean

    def _mixed(
        self, asked: str, label: str, parts: Sequence[MixturePart], param: str | None = None
    ) -> ResolvedModel:
        """Return what ``parts`` mean now; ``param`` is the request's field that errors are about."""
        model = self._blended(asked, label, parts, param)
        difference = self._compared.get(_digests(model.part_texts)) if model.part_texts else None
        if difference is not None:
            raise InvalidMixture(difference)
        return model

    def _blended(
        self, asked: str, label: str, parts: Sequence[MixturePart], param: str | None = None
    ) -> ResolvedModel:
        check_parts(parts, self._settings.max_mixture_parts)
        found = [
            Found(part.adapter, part_weight(part.adapter, part.weight), self._part(part.adapter, param))
            for part in parts
        ]
        return blended(asked, label, found, self._settings)

    def _part(self, name: str, param: str | None) -> Entry:
        """Return the adapter that a part's name means now."""
        entry = self._served.find(name)
        if entry is not None and entry.reason is None:
            return entry
        if entry is not None:
            raise AdapterUnavailable(f"part {name!r} can't be served: {entry.reason}", param=param)
        if name in self._bases:
            raise InvalidMixture(
                f"part {name!r} is the base, which is in every mixture as it is: leave it out"
            )
        if name in self._records:
            raise InvalidMixture(f"part {name!r} is a mixture: name the adapters that it mixes")
        told = self._versions_of(name) or f"adapters: {list_names(self._served.active)}"
        raise ModelNotFound(f"part {name[:LONGEST_ECHO]!r} does not exist; {told}", param=param)

    def _versions_of(self, text: str) -> str | None:
        """Return what is said of a version that isn't there; None: ``text`` asks for no version of what is."""
        name = without_version(text)
        if name != text and (name in self._records or name in self._bases):
            return f"{name[:LONGEST_ECHO]!r} is no adapter, and has no versions to ask for"
        return self._served.other_versions(text)

    def _parse(self, model: str) -> tuple[MixturePart, ...]:
        most = self._settings.max_mixture_parts
        if model.count("+") >= most:  # before they are taken apart: a client may send a million
            raise InvalidMixture(
                f"the mixture has {model.count('+') + 1} parts, at most {most} are served (--max-mixture-parts)"
            )
        parts = parse_mixture(model, self._knows)
        if len(model) > most * LONGEST_PART and all(self._knows(part.adapter) for part in parts):
            raise InvalidMixture(  # it is spaces, and each event of an answer says again what was asked
                f"the mixture is written in {len(model)} characters, at most {most * LONGEST_PART} are read: leave out "
                "the spaces"
            )
        return parts

    def _knows(self, name: str) -> bool:
        return self._served.find(name) is not None or name in self._records or name in self._bases

    def _show(self, record: MixtureRecord) -> MixtureEntry:
        reason = None
        try:
            self._mixed(record.name, record.name, record.parts)
        except (InvalidMixture, ModelNotFound, AdapterUnavailable) as error:
            reason = error.message
        used = self._usage.of(record.name)
        return MixtureEntry(record, tuple(map(self._now, record.parts)), reason, used)

    def _now(self, part: MixturePart) -> ResolvedPart | MixturePart:
        entry = self._served.find(part.adapter)
        if entry is None:
            return part
        return ResolvedPart(entry.record.id, entry.record.name, entry.record.version, part.weight)

    def _unknown(self, name: str) -> UnknownAdapter:
        asked = name[:LONGEST_ECHO]
        return UnknownAdapter(f"there is no mixture {asked!r}; mixtures: {list_names(self._records)}")


def _digests(texts: Sequence[PartText]) -> Hashable:
    return tuple((text.adapter, text.digest) for text in texts)


def _names(parts: Sequence[MixturePart]) -> Iterator[str]:
    return (part.adapter for part in parts)
