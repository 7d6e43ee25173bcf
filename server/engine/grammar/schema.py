"""What of a JSON schema is refused before it is compiled: too much of it, words that would be dropped, no end.

The compiler refuses by name what it can't enforce. Not its to find: references in a circle that no text can end, words
that loosen what it enforces, and those that mean nothing to it but something to whoever wrote them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from manylora.server.engine.grammar.grammar import GrammarRefused

Satisfiable = Callable[[Mapping[str, Any]], bool]
MAX_CHARACTERS = 256 << 10
"""Of a schema's names and values."""
MAX_VALUES = 20_000
MAX_DEPTH = 100
"""Of JSON: a schema inside properties is two deeper."""
_SCHEMAS = ("items", "additionalProperties", "additionalItems", "contains", "not", "if", "then", "else")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_WORDS = """
    $ref type enum const properties patternProperties additionalProperties required minProperties maxProperties
    propertyNames items prefixItems additionalItems minItems maxItems uniqueItems contains minContains maxContains
    minLength maxLength pattern format minimum maximum exclusiveMinimum exclusiveMaximum multipleOf allOf anyOf oneOf
    not if then else dependentRequired dependentSchemas dependencies unevaluatedProperties unevaluatedItems
"""
_KNOWN = frozenset(_WORDS.split())
_CONTENT = ("contentEncoding", "contentMediaType", "contentSchema")
_BY_LOWER_CASE = {name.lower(): name for name in _KNOWN}
_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")


def check_schema(schema: object, satisfiable: Satisfiable) -> None:
    """Raise GrammarRefused for a schema that isn't to be compiled; ``schema`` is JSON.

    ``satisfiable`` says whether a schema without references has a text.
    """
    if not isinstance(schema, dict | bool):
        raise GrammarRefused(f"a schema is an object, not {type(schema).__name__}")
    check_size(schema)
    for path, each in subschemas(schema):
        _check_words(path, each)
    _check_ends(schema, satisfiable)


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


def subschemas(schema: object, path: str = "#") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every schema in a schema, itself first, with its JSON pointer. Values that aren't schemas are left out."""
    waiting: list[tuple[str, object]] = [(path, schema)]
    while waiting:
        at, each = waiting.pop()
        if not isinstance(each, dict):
            continue
        yield at, each
        for key, value in each.items():
            if key in _MAPS and isinstance(value, dict):
                waiting += [(f"{at}/{key}/{_escaped(name)}", inner) for name, inner in value.items()]
            elif key in _LISTS and isinstance(value, list):
                waiting += [(f"{at}/{key}/{number}", inner) for number, inner in enumerate(value)]
            elif key in _SCHEMAS:
                waiting.append((f"{at}/{key}", value))


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _check_words(path: str, schema: Mapping[str, Any]) -> None:
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
    if path != "#" and ("$id" in schema or "$anchor" in schema or "$dynamicAnchor" in schema):
        raise GrammarRefused(f'$id and $anchor at {path} are not followed: use $defs and "$ref": "#/$defs/…"')


def _check_ends(root: object, satisfiable: Satisfiable) -> None:
    """Raise GrammarRefused if a reference is not to the schema itself, or no text of the schema can end.

    The least fixed point: a schema can end if what it demands can, by those already known to.
    """
    by_path: dict[str, object] = {}
    every = list(subschemas(root))
    references: dict[str, object] = {}
    for path, each in every:
        by_path[path] = each
        reference = each.get("$ref")
        if reference is None:
            continue
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise GrammarRefused(
                f"$ref {str(reference)[:100]!r} at {path} is not followed: only references into the schema itself are, "
                'as "#/$defs/…"'
            )
        references[reference] = _target(root, reference)
    if not references:
        return
    ends = _Ends(satisfiable)
    ending = ends.ending
    grown = True
    while grown:
        grown = False
        for reference, target in references.items():
            if reference not in ending and ends.of(target):
                ending.add(reference)
                grown = True
    endless = [reference for reference in references if reference not in ending]
    # One that only an optional part asks for is as wrong: the model could begin what it can't end.
    if endless:
        raise GrammarRefused(
            f"$ref {endless[0][:100]!r} can't end: what it demands demands itself again; make a member on the way "
            'optional, or allow "null" or an empty array in its place'
        )


def _target(root: object, reference: str) -> object:
    """Return what a pointer of a schema points at (RFC 6901, as a fragment)."""
    found = root
    for part in reference.split("/")[1:]:
        name = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            raise GrammarRefused(f"$ref {reference[:100]!r} points at nothing in the schema")
    return found


class _Ends:
    """Which schemas have a text that ends, if those of the references in ``ending`` have."""

    def __init__(self, satisfiable: Satisfiable) -> None:
        self.ending: set[str] = set()
        self._satisfiable = satisfiable
        self._known: dict[int, bool] = {}
        """Of schemas without references, by identity."""

    def of(self, schema: object) -> bool:
        """Say whether a text of the schema can end."""
        if not isinstance(schema, dict):
            return schema is not False
        if "enum" in schema or "const" in schema:
            return True
        if not any("$ref" in each for _, each in subschemas(schema)):
            if id(schema) not in self._known:
                self._known[id(schema)] = self._satisfiable(schema)
            return self._known[id(schema)]
        if isinstance(schema.get("$ref"), str) and schema["$ref"] not in self.ending:
            return False
        if not all(map(self.of, _list(schema, "allOf"))):
            return False
        for word in ("anyOf", "oneOf"):
            members = _list(schema, word)
            if members and not any(map(self.of, members)):
                return False
        kinds = schema.get("type", _TYPES)
        return any(self._kind(kind, schema) for kind in ([kinds] if isinstance(kinds, str) else kinds))

    def _kind(self, kind: object, schema: Mapping[str, Any]) -> bool:
        if kind == "object":
            properties = schema.get("properties")
            known = properties if isinstance(properties, dict) else {}
            others = schema.get("additionalProperties", True)
            required = [name for name in _list(schema, "required") if isinstance(name, str)]
            return all(self.of(known.get(name, others)) for name in required)
        if kind == "array":
            least = schema.get("minItems", 0)
            prefix = [*_list(schema, "prefixItems"), *_list(schema, "items")]
            rest = schema.get("items", True)
            rest = schema.get("additionalItems", True) if isinstance(rest, list) else rest
            count = int(min(least, MAX_VALUES)) if isinstance(least, int | float) else 0
            return all(map(self.of, prefix[:count])) and (count <= len(prefix) or self.of(rest))
        return True


def _list(schema: Mapping[str, Any], word: str) -> list[Any]:
    found = schema.get(word)
    return found if isinstance(found, list) else []
