"""Random JSON schemas, most of which something satisfies, and random texts' models over a vocabulary of bytes."""

import random
from collections.abc import Mapping
from typing import Any

Schema = dict[str, Any]
NAMES = ("a", "b", "name", "é", "x-y", "0", 'q"q')
PATTERNS = ("^[a-c]{1,3}$", "[0-9]+", "^x", "^(yes|no)$", "\\d{2}-\\w", "^[^a]*$", "(?=a)b")
FORMATS = (
    "date",
    "date-time",
    "time",
    "email",
    "uuid",
    "ipv4",
    "ipv6",
    "hostname",
    "uri",
    "uri-reference",
    "regex",
)
TEXTS = ("", "a", "é", "a b", "\n", '"', "\\", "😀", "yes")
UNHELD: tuple[Schema, ...] = (
    {"not": {"type": "null"}},
    {"if": {"type": "object"}, "then": {"required": ["a"]}},
    {"uniqueItems": True},
    {"contains": {"type": "integer"}},
    {"propertyNames": {"maxLength": 2}},
    {"dependentRequired": {"a": ["b"]}},
    {"unevaluatedProperties": False},
    {"nullable": True},
    {"x-guidance": {"lenient": True}},
    {"minlength": 2},
)
"""What can't be held, or would be dropped."""


class SchemaMaker:
    """Makes schemas from a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def make(self) -> Schema:
        """Return a schema with definitions that it and they refer to, some of them in a circle."""
        definitions = {f"d{number}": self._schema(2) for number in range(self._random.randrange(3))}
        schema = self._schema(3)
        if definitions:
            schema["$defs"] = definitions
        return schema

    def _schema(self, depth: int) -> Schema:
        pick = self._random
        kinds = ["string", "number", "integer", "boolean", "null", "enum", "const", "any"]
        if depth:
            kinds += ["object", "object", "array", "array", "anyOf", "oneOf", "allOf", "ref", "types"]
        made: Schema = getattr(self, f"_{pick.choice(kinds)}")(depth - 1)
        if pick.random() < 0.03:
            made |= pick.choice(UNHELD)
        return made

    def _any(self, depth: int) -> Schema:
        return {"description": "anything"} if self._random.random() < 0.1 else self._boolean(depth)

    def _boolean(self, depth: int) -> Schema:
        return {"type": "boolean"}

    def _null(self, depth: int) -> Schema:
        return {"type": "null"}

    def _string(self, depth: int) -> Schema:
        pick = self._random
        made: Schema = {"type": "string"}
        if pick.random() < 0.6:
            made["maxLength"] = pick.randrange(8)
        if pick.random() < 0.3:
            made["minLength"] = pick.randrange(5)
        if pick.random() < 0.2:
            made["pattern"] = pick.choice(PATTERNS)
        if pick.random() < 0.1:
            made["format"] = pick.choice(FORMATS)
        return made

    def _number(self, depth: int) -> Schema:
        pick = self._random
        made: Schema = {"type": "number"}
        if pick.random() < 0.5:
            made[pick.choice(("minimum", "exclusiveMinimum"))] = pick.choice((0, -3.5, 2, 1e3))
        if pick.random() < 0.5:
            made[pick.choice(("maximum", "exclusiveMaximum"))] = pick.choice((7, 2.25, 100, 1e4))
        return made

    def _integer(self, depth: int) -> Schema:
        made = {**self._number(depth), "type": "integer"}
        return (
            {**made, "multipleOf": self._random.choice((2, 5, 10))} if self._random.random() < 0.2 else made
        )

    def _enum(self, depth: int) -> Schema:
        return {"enum": [self._value(1) for _ in range(self._random.randrange(1, 4))]}

    def _const(self, depth: int) -> Schema:
        return {"const": self._value(2)}

    def _value(self, depth: int) -> Any:
        pick = self._random
        kind = pick.randrange(7 if depth else 5)
        if kind == 5:
            return [self._value(depth - 1) for _ in range(pick.randrange(3))]
        if kind == 6:
            return {name: self._value(depth - 1) for name in pick.sample(NAMES, pick.randrange(3))}
        return (
            None,
            pick.random() < 0.5,
            pick.randrange(-50, 50),
            pick.choice((0.5, 2.25)),
            pick.choice(TEXTS),
        )[kind]

    def _object(self, depth: int) -> Schema:
        pick = self._random
        names = pick.sample(NAMES, pick.randrange(4))
        made: Schema = {"type": "object", "properties": {name: self._schema(depth) for name in names}}
        made["required"] = [name for name in names if pick.random() < 0.7]
        if pick.random() < 0.7:
            made["additionalProperties"] = False if pick.random() < 0.7 else self._schema(depth)
        if pick.random() < 0.1:
            made["patternProperties"] = {pick.choice(PATTERNS[:3]): self._schema(depth)}
        if pick.random() < 0.1:
            made[pick.choice(("minProperties", "maxProperties"))] = pick.randrange(3)
        return made

    def _array(self, depth: int) -> Schema:
        pick = self._random
        made: Schema = {"type": "array", "items": self._schema(depth), "maxItems": pick.randrange(4)}
        if pick.random() < 0.3:
            made["minItems"] = pick.randrange(3)
        if pick.random() < 0.2:
            made["prefixItems"] = [self._schema(depth) for _ in range(pick.randrange(1, 3))]
        return made

    def _anyOf(self, depth: int) -> Schema:  # noqa: N802  # the keyword
        return {"anyOf": [self._schema(depth) for _ in range(self._random.randrange(1, 4))]}

    def _oneOf(self, depth: int) -> Schema:  # noqa: N802
        return {"oneOf": [self._schema(depth) for _ in range(self._random.randrange(1, 3))]}

    def _allOf(self, depth: int) -> Schema:  # noqa: N802
        return {"allOf": [self._object(depth), {"type": "object", "required": [self._random.choice(NAMES)]}]}

    def _types(self, depth: int) -> Schema:
        made = self._object(depth)
        return {**made, "type": ["object", "null"]}

    def _ref(self, depth: int) -> Schema:
        made: Schema = {"$ref": self._random.choice(("#/$defs/d0", "#/$defs/d1", "#"))}
        return {**made, "title": "a reference"} if self._random.random() < 0.5 else made


def byte_vocabulary() -> tuple[list[bytes], Mapping[str, int], int]:
    """Return the tokens' bytes, the control tokens, and the id that ends a text: all bytes, and some longer tokens."""
    words = [
        '{"',
        '":',
        '": ',
        '", "',
        '"}',
        "},",
        "[]",
        "  ",
        "    ",
        "\n",
        "\n\n",
        "\n  ",
        "\r\n",
        "\t",
        "true",
        "null",
    ]
    words += ["10", "0.", "yes", "nam", "name", "é", "\\n", '\\"', "\\u", "2026-", "e+"]
    pieces = [bytes([byte]) for byte in range(256)]
    pieces += [word.encode() for word in words if len(word.encode()) > 1]
    return [*pieces, b"<end>"], {"<end>": len(pieces)}, len(pieces)
