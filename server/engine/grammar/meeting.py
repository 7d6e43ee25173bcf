"""Which schemas of a JSON schema may hold of one and the same value: their bounds meet there."""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

from manylora.server.engine.grammar.places import Place, is_local, list_of, target

_TOGETHER = ("allOf", "anyOf", "oneOf")
_ALONE = ("not", "if", "then", "else")
_REST = None
_Slot = tuple[str, Hashable]
"""Members or items, and which of them; _REST: any."""


def groups(root: object, places: Sequence[Place]) -> list[list[dict[str, Any]]]:
    """Return a schema's parts by what they may hold of: a part, its members and what it refers to go together.

    So do the members and the items of those that do. Some that never meet may, none that can are apart.
    """
    meeting = _Meeting(places)
    for place in places:
        for other in _together(root, place.schema):
            meeting.unite(place.schema, other)
    found: dict[int, list[dict[str, Any]]] = {}
    for place in places:
        found.setdefault(meeting.first(id(place.schema)), []).append(place.schema)
    return list(found.values())


class _Meeting:
    """Sets of schemas that are united, and with them what is in the same slot of both."""

    def __init__(self, places: Sequence[Place]) -> None:
        self._up = {id(place.schema): id(place.schema) for place in places}
        self._slots: dict[int, dict[_Slot, int]] = {identity: {} for identity in self._up}
        several: list[tuple[int, int]] = []
        for place in places:
            slots = self._slots[id(place.schema)]
            several += [
                (slots.setdefault(slot, id(inner)), id(inner))
                for slot, inner in _slots_of(place.schema)
                if id(inner) in self._up
            ]
        self._unite(several)
        for place in places:
            if place.schema.get("patternProperties"):  # they hold of the named members too
                self._unite(self._spread(self.first(id(place.schema))))

    def first(self, identity: int) -> int:
        """Return which schema stands for a set."""
        while self._up[identity] != identity:
            self._up[identity] = identity = self._up[self._up[identity]]
        return identity

    def unite(self, one: dict[str, Any], other: dict[str, Any]) -> None:
        """Have two schemas hold of one value."""
        if id(other) in self._up:
            self._unite([(id(one), id(other))])

    def _unite(self, waiting: list[tuple[int, int]]) -> None:
        while waiting:
            one, other = map(self.first, waiting.pop())
            if one == other:
                continue
            if len(self._slots[one]) < len(self._slots[other]):
                one, other = other, one
            self._up[other] = one
            slots = self._slots[one]
            waiting += [
                (slots.setdefault(slot, inner), inner) for slot, inner in self._slots.pop(other).items()
            ]
            waiting += self._spread(one)

    def _spread(self, identity: int) -> list[tuple[int, int]]:
        """Return what meets because a schema for any member, or any item, is there; it has their slots from now on."""
        slots = self._slots[identity]
        meets: list[tuple[int, int]] = []
        for kind in ("member", "item"):
            rest = slots.get((kind, _REST))
            if rest is not None:
                named = [slot for slot in slots if slot[0] == kind and slot[1] is not _REST]
                meets += [(rest, slots.pop(slot)) for slot in named]
        return meets


def _together(root: object, schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what holds of the value that a schema holds of."""
    found = [each for word in _TOGETHER for each in list_of(schema, word)]
    found += [schema.get(word) for word in _ALONE]
    if isinstance(schema.get("dependentSchemas"), dict):
        found += schema["dependentSchemas"].values()
    if is_local(schema.get("$ref")):
        found.append(target(root, schema["$ref"]))
    yield from (each for each in found if isinstance(each, dict))


def _slots_of(schema: dict[str, Any]) -> Iterator[tuple[_Slot, object]]:
    """Yield the schemas of a schema's members and items."""
    for word, slot in (("properties", None), ("patternProperties", ("member", _REST))):
        inner = schema.get(word)
        if isinstance(inner, dict):
            yield from ((slot or ("member", name), each) for name, each in inner.items())
    yield ("member", _REST), schema.get("additionalProperties")
    for word in ("prefixItems", "items"):
        inner = schema.get(word)
        if isinstance(inner, list):
            yield from ((("item", number), each) for number, each in enumerate(inner))
        else:
            yield ("item", _REST), inner
    yield from ((("item", _REST), schema.get(word)) for word in ("additionalItems", "contains"))
