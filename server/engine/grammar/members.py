"""Members of objects: what the library gets wrong of them, said otherwise where it can be, and refused where it can't.

It takes a member of any name but those of ``properties`` as often as it comes, so it can't count them. It goes through
all members that may be left out at once, up to a limit of its own. And where no name is left that a pattern accepts it
still lets one begin.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from manylora.server.engine.grammar.bounds import is_number
from manylora.server.engine.grammar.grammar import GrammarRefused
from manylora.server.engine.grammar.places import Place, is_local, list_of, required_names, target

MOST_OPTIONAL = 450
"""Members one after the other that may be left out: of 498 the library takes four ways each, and 2,000 at most."""
_ONE_NAME = re.compile(r"\^([\w -]*)\$")
"""A pattern that accepts one name, without anything that means something else in it."""


def name_members(schema: dict[str, Any]) -> None:
    """Say a pattern that accepts one name as the member of that name; in place."""
    patterns, properties = schema.get("patternProperties"), schema.get("properties", {})
    if not isinstance(patterns, dict) or not isinstance(properties, dict):
        return
    for pattern in list(patterns):
        found = _ONE_NAME.fullmatch(pattern)
        if found is None:
            continue
        name, inner = found.group(1), patterns.pop(pattern)
        properties[name] = {"allOf": [properties[name], inner]} if name in properties else inner
        schema["properties"] = properties
    if not patterns:
        del schema["patternProperties"]


def check_members(root: object, places: Sequence[Place]) -> None:
    """Raise GrammarRefused for objects whose members the library can't hold."""
    found = {id(place.schema): list(_runs(place.schema)) for place in places}
    runs = {of: max(its) for of, its in found.items()}
    first = {of: its[0] for of, its in found.items()}
    for place in places:
        _check_least(place)
        _check_choices(root, place, first)
        run = sum(runs.get(id(each), 0) for each in _merged(root, place.schema))
        if run > MOST_OPTIONAL:
            raise GrammarRefused(
                f"properties at {place} has {run:,} members one after the other that may be left out, and at most "
                f"{MOST_OPTIONAL} can be held: name some in required, or put them into objects of their own"
            )


def _check_choices(root: object, place: Place, first: Mapping[int, int]) -> None:
    """Raise GrammarRefused if too many members may be left out before others in the schemas of a choice.

    ``first`` says how many in each, by the schema's identity.
    """
    for word in ("anyOf", "oneOf"):
        parts = [part for part in list_of(place.schema, word) if isinstance(part, dict)]
        found = {id(target(root, part["$ref"]) if is_local(part.get("$ref")) else part) for part in parts}
        count = sum(first.get(one, 0) for one in found)
        if count > MOST_OPTIONAL:
            raise GrammarRefused(
                f"{word} at {place} has {count:,} members that may be left out before any that must be there, and at "
                f"most {MOST_OPTIONAL} can be held: have each begin with one that is required"
            )


def _check_least(place: Place) -> None:
    kinds = place.schema.get("type", "object")
    if kinds != "object" and not (isinstance(kinds, list) and "object" in kinds):
        return
    least = place.schema.get("minProperties")
    # Of others than the required one is there if one is written, however often.
    if is_number(least) and least > len(required_names(place.schema)) + 1:
        raise GrammarRefused(
            f"minProperties at {place} can't be held: the same member could be written twice, and count for two; "
            "name members in properties and required"
        )


def _runs(schema: dict[str, Any]) -> Iterator[int]:
    """Yield how many of a schema's own members may be left out one after the other, those that come first at first."""
    properties, needed = schema.get("properties"), required_names(schema)
    run = 0
    for name in properties if isinstance(properties, dict) else ():
        if name in needed:
            yield run
            run = 0
        else:
            run += 1
    yield run


def _merged(root: object, schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a schema and those whose members the library takes for its own, each as far as one reference leads."""
    for part in (schema, *list_of(schema, "allOf")):
        if isinstance(part, dict):
            yield part
            found = target(root, part["$ref"]) if is_local(part.get("$ref")) else None
            if isinstance(found, dict) and found is not schema:
                yield found
