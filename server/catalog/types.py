"""What the adapter catalog takes and gives: settings, results, and the engine and observer behind it."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from manylora.adapters.base_form import BaseForm
from manylora.adapters.kept_norms import KeptNorms
from manylora.adapters.manifest import NONE, AdapterManifest
from manylora.adapters.mixtures import MixturePart, spell
from manylora.adapters.names import AUTO, with_version
from manylora.adapters.pooling import Way
from manylora.adapters.records import AdapterRecord, MixtureRecord
from manylora.adapters.sources.finding import Finding
from manylora.adapters.tokens import AdapterText, PartText
from manylora.adapters.types import AdapterWeights, BaseModules, FreedAdapter, Tier
from manylora.adapters.vocabulary import BaseVocabulary
from manylora.server.catalog.nearest import Near


class AdapterEngine(Protocol):
    """The part of AsyncEngine that the catalog needs. Methods take effect between two steps.

    One that raises has changed nothing. The catalog never cancels a call, and calls for one id never overlap.
    """

    async def add_adapter(
        self,
        adapter_id: int,
        weights: AdapterWeights,
        *,
        load_from: Callable[[], AdapterWeights],
        preload: bool,
        pinned: bool,
    ) -> None:
        """Take ``weights`` into the host tier and, with ``preload``, into the device arena before returning.

        ``load_from`` reads them again (blocking; from any thread) once the host tier has let them go;
        it raises AdapterUnavailable when the files are damaged. Raises AdapterUnavailable without room.
        """
        ...

    async def add_adapter_cold(
        self,
        adapter_id: int,
        rank_by_module: Mapping[str, int],
        *,
        load_from: Callable[[], AdapterWeights],
        pinned: bool,
        invocation: tuple[int, ...] = (),
    ) -> None:
        """Make known an adapter that is on disk only; ``load_from`` reads it at its first request.

        ``invocation``: the token ids from whose last occurrence in a prompt on it acts; (): it always does.
        """
        ...

    async def keep_adapter(
        self, adapter_id: int, weights: AdapterWeights | None, *, preload: bool, pinned: bool
    ) -> None:
        """Change where a known adapter is kept: pinned or not and, with ``preload``, on the device before returning.

        ``weights`` are used if it has to be loaded and is on disk only. Raises AdapterUnavailable without room.
        """
        ...

    async def remove_adapter(self, adapter_id: int, *, abort: bool) -> FreedAdapter:
        """Refuse new requests, let running ones finish (or abort them), give memory back; then return."""
        ...

    async def rest_adapter(self, adapter_id: int) -> None:
        """Unpin an adapter and, once running requests have ended, keep it on disk only until somebody asks for it.

        Returns without waiting for these. ``keep_adapter`` ends that.
        """
        ...

    def adapter_tier(self, adapter_id: int) -> Tier:
        """Return where the weights are now; callable from the event loop."""
        ...


class CatalogObserver(Protocol):
    """Hears what happened, for metrics and logs. Called on the event loop; must not block or raise."""

    def loaded(self, record: AdapterRecord, seconds: float, nbytes: int) -> None:
        """A new adapter serves; ``seconds`` from the call to that, ``nbytes`` of its weights."""
        ...

    def swapped(self, old: AdapterRecord, new: AdapterRecord, seconds: float) -> None:
        """New requests use ``new`` from now on; ``seconds`` from the call to that."""
        ...

    def removed(self, record: AdapterRecord, freed: FreedAdapter, seconds: float) -> None:
        """An adapter's memory is given back; ``seconds`` since it was taken out of service."""
        ...

    def failed(self, operation: str, name: str, error: BaseException) -> None:
        """Something failed that no caller hears of."""
        ...


class SilentObserver:
    """The observer that does nothing."""

    def loaded(self, record: AdapterRecord, seconds: float, nbytes: int) -> None:
        """Do nothing."""

    def swapped(self, old: AdapterRecord, new: AdapterRecord, seconds: float) -> None:
        """Do nothing."""

    def removed(self, record: AdapterRecord, freed: FreedAdapter, seconds: float) -> None:
        """Do nothing."""

    def failed(self, operation: str, name: str, error: BaseException) -> None:
        """Do nothing."""


class WithChanges(SilentObserver):
    """An observer that also has ``look`` called whenever there are other adapters than before.

    With the name, if it was free until now.
    """

    def __init__(self, observer: CatalogObserver, look: Callable[[str | None], None]) -> None:
        self._observer = observer
        self._look = look

    def loaded(self, record: AdapterRecord, seconds: float, nbytes: int) -> None:
        """Tell both."""
        self._observer.loaded(record, seconds, nbytes)
        self._look(record.name)

    def swapped(self, old: AdapterRecord, new: AdapterRecord, seconds: float) -> None:
        """Tell both."""
        self._observer.swapped(old, new, seconds)
        self._look(None)

    def removed(self, record: AdapterRecord, freed: FreedAdapter, seconds: float) -> None:
        """Tell both."""
        self._observer.removed(record, freed, seconds)
        self._look(None)

    def failed(self, operation: str, name: str, error: BaseException) -> None:
        """Tell the observer: nothing has changed."""
        self._observer.failed(operation, name, error)


MIXTURE_LABEL = "mixture"
"""What metrics call every mixture that has no name of its own."""
AUTO_LABEL = AUTO
"""What metrics call prompts that are read to choose an adapter, and examples; nothing else has that name."""
OTHER_LABEL = "other"
"""What metrics call everything beyond the names that they may tell apart."""


def label_of(name: str) -> str:
    """Return what metrics call what has this name: names hold no ``=``, so it is not taken for one of the above."""
    return f"={name}" if name in (MIXTURE_LABEL, OTHER_LABEL) else name


def _any_text(directory: Path, text: AdapterText) -> None:
    """Take whatever an adapter brings for texts."""


async def _any_texts(parts: Sequence[PartText]) -> None:
    """Take whatever the parts of a mixture bring for texts."""


@dataclass(frozen=True, slots=True)
class CatalogSettings:
    """What adapters are checked against, and where they may come from."""

    base_names: tuple[str, ...]
    """The names under which the base is served; no adapter may have one of them."""
    finding: Finding
    """Where they may come from."""
    modules: BaseModules
    max_rank: int
    dtype: torch.dtype
    vocab_size: int | None = None
    check_text: Callable[[Path, AdapterText], None] = _any_text
    """Refuses (blocking) an adapter in a directory whose template or tokenizer can't be served with the base."""
    workers: int = 2
    """How many adapters are copied, hashed or read at the same time."""
    download_workers: int = 4
    """How many are downloaded at the same time."""
    max_source_bytes: int = 8 << 30
    """How many bytes one of those may have."""
    is_busy: Callable[[], bool] = lambda: False
    """Says whether requests run that adapters which no request waits for should hardly slow down."""
    inherited_up_to: int = 0
    """Adapters with ids up to this were registered when a base was known by its config.json alone."""
    base_template: str | None = None
    """The base's chat template: a part that brings none, and one that brings this one, have the same."""
    check_alike: Callable[[Sequence[PartText]], Awaitable[None]] = _any_texts
    """Refuses parts of a mixture that are tokenised or ended differently. Raises InvalidMixture."""
    max_mixture_parts: int = 8
    """Parts that a mixture may have."""
    note_on: Callable[[BaseForm | None], str | None] = lambda trained: None
    """Says what its owner should know of an adapter that was trained on the base in such a form."""
    arena_rows: int | None = None
    """Rank rows that the arena has of each module; None: a mixture of any ranks is taken."""
    norms: KeptNorms | None = None
    """Lengths of the served base's rows; None: adapters that need them (DoRA) are refused."""
    keep_versions: int = 2
    """Old versions that a name keeps, to be asked for and gone back to."""
    vocabulary: BaseVocabulary | None = None
    """The base's; None: adapters that change embedding or head are refused."""
    vocabulary_bytes: int | None = None
    """Memory on the device for adapters' own embeddings and heads; None: as much as they want."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """Where an adapter is to be kept. None leaves it as it is; for a new adapter that is False."""

    preload: bool | None = None
    """Put it on the device before the call returns, and at each start."""
    pin: bool | None = None
    """Never evict it from the device."""

    def of(self, before: AdapterRecord | None) -> tuple[bool, bool]:
        """Return (preload, pin) for what was kept like ``before`` until now; None: it is new."""
        preload, pin = (False, False) if before is None else (before.preload, before.pinned)
        return preload if self.preload is None else self.preload, pin if self.pin is None else self.pin


@dataclass(frozen=True, slots=True)
class PutOutcome:
    """What came of putting weights under a name."""

    record: AdapterRecord
    """The one in force now."""
    is_new: bool
    """Whether its id was minted by this call; False if the name had these weights already."""
    replaced: AdapterRecord | None = None
    """The version before it, if other weights had the name."""


@dataclass(frozen=True, slots=True)
class ResolvedPart:
    """One adapter of a mixture, and the version of it that a request gets."""

    adapter_id: int
    name: str
    version: int
    weight: float
    """A float32's value; a part with 0 is told of, but not computed."""


@dataclass(frozen=True, slots=True)
class Described:
    """An adapter that can be served, and what it says of itself."""

    name: str
    manifest: AdapterManifest

    @property
    def key(self) -> str:
        """By which the vectors of its examples are kept: adapters with the same ones share them."""
        return self.manifest.key


@dataclass(frozen=True, slots=True)
class Routed:
    """How the model of a request was chosen that left the choice to the server."""

    name: str
    """What answers: an adapter, or the base."""
    score: float
    """How near the prompt is to the examples of the nearest, from -1 to 1."""
    nearest: str
    """What is nearest; another than ``name`` if it wasn't near enough."""
    threshold: float
    """How near that had to be."""
    second: Near | None = None
    """What came next; None: nothing did."""
    prompt_tokens: int = 0
    """Tokens that were read for it."""


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """What a model name in a request means."""

    adapters: tuple[tuple[int, float], ...]
    """(adapter id, weight): in order of the ids, none with weight 0, weights float32's values. () is the base; one pair
    with weight 1 is that adapter itself, whatever it was asked as."""
    name: str
    """What was asked."""
    label: str
    """What metrics call it: an unnamed mixture is MIXTURE_LABEL, everything else its own name."""
    parts: tuple[ResolvedPart, ...] = ()
    """A mixture's, in the order asked; () for the base and for an adapter asked by its name."""
    itself: ResolvedPart | None = None
    """The adapter, and its version, that a name means; None for the base and for mixtures."""
    text: AdapterText = field(default_factory=AdapterText)
    """What it brings for texts: the adapter's own, or what all parts have in common."""
    digest: str | None = None
    """Of the files that ``text``'s tokenizer is in; None: the base's tokenizer is used."""
    poolings: frozenset[Way] = frozenset()
    """How texts are pooled with it, as its adapters say: none, or parts that differ, say nothing."""
    part_texts: tuple[PartText, ...] = ()
    """Of parts that may be tokenised differently: who makes tokens for them checks that they are not."""
    routed: Routed | None = None
    """How it was chosen, if the request left that to the server."""

    @property
    def chat_template(self) -> str | None:
        """Its own template; None: the base's."""
        return self.text.chat_template

    @property
    def answers(self) -> str:
        """Who answers, so that the same may be asked for again: ``sql@3``, ``sql@3:0.7+pirate@1:0.3``, or the base."""
        if self.itself is not None:
            return with_version(self.itself.name, self.itself.version)
        parts = [MixturePart(with_version(each.name, each.version), each.weight) for each in self.parts]
        return spell(parts) if parts else self.name


@dataclass(frozen=True, slots=True)
class Used:
    """How often something was asked for since the server started."""

    requests: int = 0
    last: int | None = None
    """Unix time; None: not since then."""


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One adapter as the management routes show it: rank, version and creation time are in the record."""

    record: AdapterRecord
    tier: Tier | None
    """None when it is unavailable."""
    reason: str | None
    """Why it can't be served, if it can't."""
    inherited: str | None = None
    """Said of one that may have been registered for other weights than the base's."""
    trained_otherwise: str | None = None
    """Said of one that was trained on the base in another form than it is held in."""
    nbytes: int = 0
    """Of its files in the store; 0 if they are gone."""
    used: Used = Used()
    canary: AdapterRecord | None = None
    """The version that gets a share of its name's requests."""
    versions: tuple[int, ...] = ()
    """Those of its name that may be asked for, the newest first."""
    invocation: tuple[int, ...] = ()
    """Token ids from whose last occurrence in a prompt on it acts; (): it always does, or is unavailable."""
    manifest: AdapterManifest = NONE
    """What its files say of it."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What its owner should know though it can be served."""
        return tuple(each for each in (self.trained_otherwise, self.inherited) if each is not None)


@dataclass(frozen=True, slots=True)
class MixtureEntry:
    """One named mixture as the management routes show it."""

    record: MixtureRecord
    parts: tuple[ResolvedPart | MixturePart, ...]
    """What its parts' names mean now, in the order given; one without a version is not there."""
    reason: str | None = None
    """Why it can't be served now, if it can't."""
    used: Used = Used()


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What a restart found."""

    restored: int
    unavailable: Mapping[str, str]
    """Names to reasons."""
    swept: int
    """Leftovers of a crash that were deleted from the store."""
    mixtures: Mapping[str, str | None] = field(default_factory=dict)
    """Names of mixtures to why they can't be served; None: they can."""
