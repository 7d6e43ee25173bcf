"""The schemas that a JSON schema is made of, and where each is."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from manylora.server.engine.grammar.grammar import GrammarRefused

SCHEMAS = ("items", "additionalProperties", "additionalItems", "contains", "not", "if", "then", "else")
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
VALUES = frozenset(("const", "enum"))
"""Words whose values are held as they are: what looks like a schema there must not be taken for one, and changed."""
MOST_TOLD = 200
"""Characters of a pointer."""


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """A schema in a schema. As text it is a JSON pointer, which is made only where it is told: names may be long."""

    schema: dict[str, Any]
    parent: "Place | None" = None
    steps: tuple[str, ...] = ()
    """From there."""

    def __str__(self) -> str:
        steps: list[str] = []
        place: Place | None = self
        while place is not None:
            steps[:0] = place.steps
            place = place.parent
        pointer = "/".join(("#", *(step.replace("~", "~0").replace("/", "~1") for step in steps)))
        return pointer if len(pointer) <= MOST_TOLD else f"{pointer[:MOST_TOLD]}…"


def places_in(root: object) -> Iterator[Place]:
    """Yield every schema in a schema, itself first; those last that only references find, outside the known keywords.

    Values that aren't schemas are left out. Raises GrammarRefused for a reference to one, or to nothing.
    """
    seen: set[int] = set()
    maps: set[int] = set()
    references: list[str] = []
    waiting = [Place(root)] if isinstance(root, dict) else []
    while waiting or references:
        if not waiting:
            reference = references.pop()
            found = target(root, reference)
            steps = _steps(reference)
            if isinstance(found, bool) or id(found) in seen:
                continue
            if not isinstance(found, dict) or id(found) in maps or not VALUES.isdisjoint(steps):
                raise GrammarRefused(f"$ref {reference[:100]!r} points at no schema: put it in $defs")
            waiting.append(Place(found, None, tuple(steps)))
        place = waiting.pop()
        if id(place.schema) in seen:
            continue
        seen.add(id(place.schema))
        yield place
        if is_local(place.schema.get("$ref")):
            references.append(place.schema["$ref"])
        maps.update(id(place.schema[word]) for word in MAPS if isinstance(place.schema.get(word), dict))
        waiting += [Place(inner, place, path) for path, inner in _inside(place.schema)]


def list_of(schema: Mapping[str, Any], word: str) -> list[Any]:
    """Return a schema's list; an empty one where it has none."""
    found = schema.get(word)
    return found if isinstance(found, list) else []


def required_names(schema: Mapping[str, Any]) -> dict[str, None]:
    """Return the members that an object must have, each once, in order."""
    return dict.fromkeys(name for name in list_of(schema, "required") if isinstance(name, str))


def is_local(reference: object) -> bool:
    """Say whether a reference is one into the schema itself, by a pointer."""
    return isinstance(reference, str) and (reference == "#" or reference.startswith("#/"))


def target(root: object, reference: str) -> object:
    """Return what a pointer of a schema points at (RFC 6901, as a fragment). Raises GrammarRefused."""
    found = root
    for name in _steps(reference):
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            raise GrammarRefused(f"$ref {reference[:100]!r} points at nothing in the schema")
    return found


def _steps(reference: str) -> list[str]:
    return [unquote(part).replace("~1", "/").replace("~0", "~") for part in reference.split("/")[1:]]


def _inside(schema: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield the schemas directly inside, with the steps there."""
    found: list[tuple[tuple[str, ...], Any]]
    for key, value in schema.items():
        if key in MAPS and isinstance(value, dict):
            found = [((key, name), inner) for name, inner in value.items()]
        elif key in LISTS and isinstance(value, list):
            found = [((key, str(number)), inner) for number, inner in enumerate(value)]
        elif key in SCHEMAS:
            found = [((key,), value)]
        else:
            continue
        yield from ((steps, inner) for steps, inner in found if isinstance(inner, dict))
