"""What several adapters with weights are together: one computation, one text, one claim on the arena. Pure."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from manylora.adapters.errors import InvalidMixture
from manylora.adapters.tokens import AdapterText, PartText
from manylora.adapters.vocabulary import UNIT, VOCABULARY
from manylora.server.catalog.serving import Entry
from manylora.server.catalog.types import (
    MIXTURE_LABEL,
    CatalogSettings,
    ResolvedModel,
    ResolvedPart,
    label_of,
)

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Found:
    """A part of a mixture, and the adapter that its name means."""

    name: str
    """As it was asked for: with its version, if that was named."""
    weight: float
    """A float32's value."""
    entry: Entry


def blended(asked: str, label: str, parts: Sequence[Found], settings: CatalogSettings) -> ResolvedModel:
    """Return what ``parts`` mean together; ``label`` is for metrics. Raises InvalidMixture if they don't go together.

    What has weight 0 has no say in anything. The others are put in order of their ids: whoever asks for the same
    mixture, however it is spelled, gets the same sums and the same cache.
    """
    _check_different(parts)
    counted = sorted((part for part in parts if part.weight != 0), key=lambda part: part.entry.record.id)
    template = _template(counted, settings.base_template)
    _check_room(counted, settings)
    text, digest = _tokens(counted)
    itself = len(counted) == 1 and counted[0].weight == 1
    if not itself:
        _check_sizes(counted)
    return ResolvedModel(
        adapters=tuple((part.entry.record.id, part.weight) for part in counted),
        name=asked,
        label=label_of(counted[0].entry.record.name) if itself and label == MIXTURE_LABEL else label,
        parts=tuple(_resolved(part) for part in parts),
        text=AdapterText(
            template,
            text.special_tokens,
            text.added_tokens,
            text.has_tokenizer,
            vocab_size=counted[0].entry.text.vocab_size if itself else None,
        ),
        digest=digest,
        poolings=frozenset().union(*(part.entry.text.poolings for part in counted)),
        part_texts=_to_compare(counted),
    )


def _resolved(part: Found) -> ResolvedPart:
    record = part.entry.record
    return ResolvedPart(record.id, record.name, record.version, part.weight)


def _check_different(parts: Sequence[Found]) -> None:
    """Refuse one adapter by two names: its own, and that of a version."""
    known: dict[int, str] = {}
    for part in parts:
        other = known.setdefault(part.entry.record.id, part.name)
        if other != part.name:
            raise InvalidMixture(
                f"{other!r} and {part.name!r} are the same version: give it once, with the sum of the weights"
            )


def _template(parts: Sequence[Found], base: str | None) -> str | None:
    """Return the parts' common template; None: the base's."""
    own = [part.entry.text.chat_template for part in parts]
    effective = [base if template is None else template for template in own]
    for part, template in zip(parts, effective, strict=True):
        if template != effective[0]:
            raise InvalidMixture(
                f"parts {parts[0].name!r} and {part.name!r} have different chat templates"
                f"{_whose_is_the_base_s(parts[0], part)}: only adapters with the same one can be mixed"
            )
    return None if None in own or not own else own[0]


def _whose_is_the_base_s(one: Found, other: Found) -> str:
    plain = [part.name for part in (one, other) if part.entry.text.chat_template is None]
    return f" ({plain[0]!r} brings none and has the base's)" if plain else ""


def _brings_tokens(text: AdapterText) -> bool:
    return text.has_tokenizer or bool(text.special_tokens)


def _tokens(parts: Sequence[Found]) -> tuple[AdapterText, str | None]:
    """Return which part's tokenizer stands for all, with its digest; the base's, if a part has that."""
    if not parts or not all(_brings_tokens(part.entry.text) for part in parts):
        return AdapterText(), None
    return parts[0].entry.text, parts[0].entry.record.digest


def _to_compare(parts: Sequence[Found]) -> tuple[PartText, ...]:
    """Return what the parts' tokens are made with, unless it is plain that all are made alike."""
    if len(parts) < 2 or not any(_brings_tokens(part.entry.text) for part in parts):
        return ()
    return tuple(PartText(part.name, part.entry.text, part.entry.record.digest) for part in parts)


def _check_sizes(parts: Sequence[Found]) -> None:
    """Refuse a part that brings tokens: a sum has one vocabulary, and a row that only one part has can't be weighed."""
    for part in parts:
        size = part.entry.text.vocab_size
        if size is not None:
            raise InvalidMixture(
                f"part {part.name!r} brings an embedding and a head of its own with {size} tokens, another number than "
                "the base's: vocabularies differ, so it is used alone, at weight 1"
            )


def _check_room(parts: Sequence[Found], settings: CatalogSettings) -> None:
    """Refuse parts that no empty arena holds together: who waits or tries again gets the same."""
    rows = settings.arena_rows
    needed: Counter[str] = Counter()
    for part in parts:
        needed.update(part.entry.ranks)
    units = needed.pop(VOCABULARY, 0)
    if settings.vocabulary_bytes is not None and units * UNIT > settings.vocabulary_bytes:
        raise InvalidMixture(
            f"the parts need {units * UNIT / MIB:.1f} MiB for embeddings and heads together, and there are "
            f"{settings.vocabulary_bytes / MIB:.1f} MiB: mix fewer, or start with a larger --vocabulary-gib"
        )
    if not needed or rows is None:
        return
    module, most = max(needed.items(), key=lambda each: each[1])
    if most > rows:
        each = " + ".join(f"{part.entry.ranks.get(module, 0)} ({part.name})" for part in parts)
        raise InvalidMixture(
            f"the parts need {most} rank rows of {module} together, {each}; the arena has {rows}: mix fewer or smaller "
            "ones, or start with a larger --arena-rows"
        )
