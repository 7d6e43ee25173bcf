"""What of a JSON schema is refused before it is compiled: too much of it, words that would be dropped, no end.

The compiler refuses by name what it can't enforce. Not its to find: references in a circle that no text can end, words
that loosen what it enforces, and those that mean nothing to it but something to whoever wrote them.
"""

import sys
from collections.abc import Iterator, Sequence

from manylora.server.engine.grammar.bounds import is_number
from manylora.server.engine.grammar.ends import Unsatisfiable, check_ends
from manylora.server.engine.grammar.grammar import GrammarRefused
from manylora.server.engine.grammar.members import check_members, name_members
from manylora.server.engine.grammar.places import LISTS, MAPS, SCHEMAS, Place, is_local, places_in

MAX_CHARACTERS = 256 << 10
"""Of a schema's names and values."""
MAX_VALUES = 20_000
MAX_DEPTH = 100
"""Of JSON: a schema inside properties is two deeper."""
_WORDS = """
    $ref type enum const properties patternProperties additionalProperties required minProperties maxProperties
    propertyNames items prefixItems additionalItems minItems maxItems uniqueItems contains minContains maxContains
    minLength maxLength pattern format minimum maximum exclusiveMinimum exclusiveMaximum multipleOf allOf anyOf oneOf
    not if then else dependentRequired dependentSchemas dependencies unevaluatedProperties unevaluatedItems
"""
_KNOWN = frozenset(_WORDS.split())
_HELD_NUMBERS = frozenset(
    ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "const", "enum")
)
MOST_EXACT = (1 << 53) - 1
"""The library computes with doubles: of larger whole numbers it takes others next to them."""
_CONTENT = ("contentEncoding", "contentMediaType", "contentSchema")
_BY_LOWER_CASE = {name.lower(): name for name in _KNOWN}


def check_schema(schema: object, unsatisfiable: Unsatisfiable) -> None:
    """Raise GrammarRefused for a schema that isn't to be compiled.

    ``schema`` is JSON; members that patterns name are said in it by their names from now on.
    """
    if not isinstance(schema, dict | bool):
        raise GrammarRefused(f"a schema is an object, not {type(schema).__name__}")
    check_size(schema)
    places: list[Place] = []
    for place in places_in(schema):
        name_members(place.schema)
        _check_words(place, root=place.schema is schema)
        _check_numbers(place)
        places.append(place)
    check_members(schema, places)
    check_ends(schema, places, unsatisfiable)


def check_size(value: object) -> None:
    """Raise GrammarRefused for JSON over the limits, having looked at no more than they allow."""
    characters = values = 0
    waiting: list[tuple[object, int]] = [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        values += 1
        inside: Sequence[object] = ()
        if isinstance(item, str):
            characters += len(item)
        elif isinstance(item, dict):
            characters += sum(map(len, item))
            inside = list(item.values())
        elif isinstance(item, list):
            inside = item
        if depth > MAX_DEPTH and inside:
            raise GrammarRefused(
                f"the schema is nested deeper than {MAX_DEPTH} levels: flatten it, or use $defs"
            )
        if values + len(waiting) + len(inside) > MAX_VALUES or characters > MAX_CHARACTERS:
            raise GrammarRefused(
                f"the schema is too large: at most {MAX_CHARACTERS:,} characters and {MAX_VALUES:,} values are taken"
            )
        waiting += [(each, depth + 1) for each in inside]


def _check_words(path: Place, *, root: bool) -> None:
    schema = path.schema
    if "x-guidance" in schema:
        raise GrammarRefused(f"x-guidance at {path} can't be set: leave it out")
    if schema.get("nullable") is True:
        raise GrammarRefused(
            f'nullable at {path} is no keyword of JSON Schema and would not be held: say "type": [..., "null"]'
        )
    for word in _CONTENT:
        if word in schema:
            raise GrammarRefused(f"{word} at {path} can't be held: say what the text is by a pattern")
    for word in schema:
        meant = _BY_LOWER_CASE.get(word.lower())
        if meant is not None and word not in _KNOWN:
            raise GrammarRefused(f"{word} at {path} would not be held: the keyword is spelled {meant}")
    if not root and ("$id" in schema or "$anchor" in schema or "$dynamicAnchor" in schema):
        raise GrammarRefused(f'$id and $anchor at {path} are not followed: use $defs and "$ref": "#/$defs/…"')
    if "$ref" in schema and not is_local(schema["$ref"]):
        raise GrammarRefused(
            f"$ref {str(schema['$ref'])[:100]!r} at {path} is not followed: only references into the schema itself "
            'are, as "#/$defs/…"'
        )


def _check_numbers(path: Place) -> None:
    """Raise GrammarRefused for a number that is too large to be computed with, or to be held exactly."""
    for word, value in path.schema.items():
        if word in SCHEMAS or word in LISTS or word in MAPS:
            continue  # schemas, looked at on their own
        for number in _numbers_in(value):
            if not -sys.float_info.max <= number <= sys.float_info.max:
                raise GrammarRefused(
                    f"{word[:100]} at {path} has a number that is too large: at most 1.7e308 is taken"
                )
            if word in _HELD_NUMBERS and not -MOST_EXACT <= number <= MOST_EXACT:
                raise GrammarRefused(
                    f"{word} at {path} has a number that can't be held exactly: at most {MOST_EXACT} (2^53 - 1) is "
                    "taken; give it as a string, or leave it out"
                )


def _numbers_in(value: object) -> Iterator[float]:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if is_number(item):
            yield item
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
