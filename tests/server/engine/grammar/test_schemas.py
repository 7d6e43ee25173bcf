"""JSON schemas: what is held, what is refused and by which name, and what can't loosen anything."""

import json
import tracemalloc
from typing import Any

import pytest

from manylora.server.engine.grammar import GrammarKind, GrammarRefused, ends
from manylora.server.engine.grammar.places import target
from manylora.server.engine.grammar.schema import check_schema
from tests.server.engine.grammar.texts import accepts, compiled, of_schema, refusal

SELF = {"$ref": "#"}
UNMET = {"type": "string", "minLength": 5, "maxLength": 2}
REFUSED: list[tuple[Any, str]] = [
    ({"not": {}}, "not"),
    ({"if": {}, "then": {}}, "if"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"type": "array", "contains": {}}, "contains"),
    ({"propertyNames": {"maxLength": 3}}, "propertyNames"),
    ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ({"unevaluatedProperties": False}, "unevaluatedProperties"),
    ({"oneOf": [{"type": "string"}, {"minLength": 2}]}, "oneOf"),
    ({"type": "string", "format": "uri-reference"}, "format"),
    ({"type": "string", "pattern": "(?=a)b"}, "pattern"),
    ({"type": "string", "contentEncoding": "base64"}, "contentEncoding"),
    ({"enum": []}, "enum"),
    ({"type": "integer", "minimum": 5, "maximum": 2}, "minimum"),
    ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "'a' is unsatisfiable"),
    ({"type": "array", "prefixItems": [{}], "items": False, "minItems": 2}, "unsatisfiable"),
    ({"type": "text"}, "type"),
    ({"$ref": "https://example.org/schema"}, "$ref"),
    ({"$ref": "#/$defs/none"}, "points at nothing"),
    ({"$ref": "#there", "$anchor": "there"}, "$ref"),
    ({"properties": {"a": {"type": "string", "minlength": 3}}}, "spelled minLength"),
    ({"type": "string", "nullable": True}, "nullable"),
    ({"type": "object", "x-guidance": {"lenient": True}, "not": {}}, "x-guidance"),
    ({"properties": {"a": {"x-guidance": {"whitespace_pattern": " +"}}}}, "x-guidance at #/properties/a"),
    ({"items": {"$id": "other", "$ref": "#/a"}}, "$id"),
    (False, "false"),
    ([], "object"),
    ({"dependentSchemas": {"a": {}}}, "dependentSchemas"),
    ({"type": "array", "unevaluatedItems": False}, "unevaluatedItems"),
    ({"type": "array", "contains": {}, "minContains": 2}, "contains"),
    ({"allOf": [{"not": {"type": "null"}}, {"type": "string"}]}, "not"),
    ({"anyOf": [{"type": "null"}, {"type": "array", "uniqueItems": True}]}, "uniqueItems"),
    ({"$defs": {"a": {"if": {}, "then": False}}, "$ref": "#/$defs/a"}, "if"),
    ({"type": "string", "pattern": "(a)\\1"}, "pattern"),
    ({"type": "string", "pattern": "a(?!b)"}, "pattern"),
    ({"type": "integer", "maximum": 10**400}, "maximum at # has a number"),
    ({"exclusiveMinimum": 10**15, "maximum": 10**15 + 0.5}, "too close to another bound"),
    (
        {"properties": {"a": {"exclusiveMinimum": -(10**400)}}},
        "exclusiveMinimum at #/properties/a has a number",
    ),
    ({"enum": [{"a": [10**400]}]}, "enum at # has a number"),
    ({"enum": [1234567890123456789]}, "enum at # has a number"),
    ({"const": {"a": [-(2**53)]}}, "const at # has a number"),
    ({"properties": {"a": {"type": "integer", "minimum": 2**53}}}, "minimum at #/properties/a has a number"),
    ({"type": "number", "maximum": 1e300}, "maximum at # has a number"),
    ({"exclusiveMinimum": 2**53}, "exclusiveMinimum at # has a number"),
    ({"exclusiveMaximum": 2**64}, "exclusiveMaximum at # has a number"),
    ({"multipleOf": 2**60}, "multipleOf at # has a number"),
    ({"$ref": "#/$defs/x", "$defs": {"x": UNMET}}, "minLength (5)"),
    ({"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": UNMET}}, "minLength (5)"),
    (
        {"anyOf": [{"type": "array", "items": SELF, "minItems": 1}, UNMET]},
        "no text: it can't be held: minLength (5)",
    ),
    ({"$ref": "#/components/x", "components": {"x": {"nullable": True}}}, "nullable at #/components/x"),
    ({"$ref": "#/properties", "properties": {"if": {"type": "null"}}}, "points at no schema"),
    ({"$ref": "#/const", "const": {"if": {}}}, "points at no schema"),
    ({"type": 5, "properties": {"a": SELF}}, "type"),
]
ENDLESS: list[dict[str, Any]] = [
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}}},
    {"type": "object", "properties": {"next": SELF}, "required": ["next"]},
    {"type": "array", "items": SELF, "minItems": 1},
    {"type": "array", "prefixItems": [{"type": "null"}, SELF], "minItems": 2},
    {"anyOf": [SELF, {"type": "object", "properties": {"a": SELF}, "required": ["a"]}]},
    {"type": "object", "additionalProperties": SELF, "required": ["a"]},
    {"anyOf": [SELF, {"type": "number", "exclusiveMinimum": 9, "maximum": 7}]},
    {
        "anyOf": [
            SELF,
            {
                "allOf": [
                    {"type": "object", "additionalProperties": False},
                    {"type": "object", "required": ["a"]},
                ]
            },
        ]
    },
]
ENDING: list[tuple[dict[str, Any], str]] = [
    ({"type": "object", "properties": {"next": SELF}, "additionalProperties": False}, '{"next":{"next":{}}}'),
    ({"type": "array", "items": SELF}, "[[],[[]]]"),
    ({"anyOf": [{"type": "null"}, {"type": "array", "items": SELF, "minItems": 1}]}, "[[null]]"),
    ({"type": ["object", "null"], "properties": {"a": SELF}, "required": ["a"]}, '{"a":{"a":null}}'),
    ({"properties": {"a": SELF}, "required": ["a"], "type": ["object", "integer"]}, '{"a":3}'),
    ({"$ref": "#/$defs/a~1b%25", "$defs": {"a/b%": {"type": "null"}}}, "null"),
    ({"$ref": "#/examples/0", "examples": [{"type": "null"}]}, "null"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"allOf": [SELF]}, {"minLength": 2}]}}}, '"ab"'),
]
HELD: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"enum": [2.5, None, True]}, ["2.5", "null", "true"], ['"2.5"', "1", "false"]),
    ({"type": "string", "pattern": "^[a-z]+$", "maxLength": 3}, ['"abc"'], ['"abcd"', '"A"', '""']),
    ({"minLength": 2}, ['"ab"', "1"], ['"a"']),
    ({"type": "string"}, ['"é"', '"a  b"', '"\\n"'], ['"\\u00e9"', '"']),
    ({"type": "string", "maxLength": 1}, ['"é"'], ['"éé"']),
    (
        {"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}}},
        ['{"a":null,"b":null}', '{"b":null,"c":1}'],
        ['{"b":null,"a":null}', '{"a":1}'],
    ),
    ({"properties": {"a": {}}, "additionalProperties": False, "type": "object"}, ['{"a":1}'], ['{"b":1}']),
    (
        {"type": "object", "patternProperties": {"^a": {"type": "integer"}}, "additionalProperties": False},
        ['{"ab":1}', "{}"],
        ['{"ab":"x"}', '{"b":1}'],
    ),
    (
        {"$ref": "#/$defs/n", "maximum": 3, "$defs": {"n": {"type": "integer", "minimum": 1}}},
        ["2"],
        ["0", "4"],
    ),
    ({"type": "string", "format": "date"}, ['"2024-02-29"'], ['"2023-02-29"', '"2100-02-29"']),
    ({"type": "string", "format": "date-time"}, ['"2024-02-29T10:00:00Z"'], ['"2024-02-29T23:59:60Z"']),
    ({"type": "string", "format": "time"}, ['"10:00:00.5+01:00"'], ['"22:59:60Z"', '"10:00:00"']),
    ({"type": "string", "format": "hostname"}, ['"a-b.example"'], ['"xn--07jceefgh4c"', '"-a"']),
    ({"type": "string", "format": "date", "pattern": "^2024"}, ['"2024-01-01"'], ['"2023-01-01"']),
    ({"type": "string", "pattern": "^\\S[\\s]$"}, ['"a\ufeff"'], ['"\ufeffa"']),
    (
        {"allOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"minProperties": 1}]},
        ['{"a":1}', '{"a":1,"b":2}'],
        ['{"a":"x"}', "{}", '{"b":1}'],
    ),
    ({"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 4}]}, ["2", "4"], ["1", "5"]),
    ({"oneOf": [{"type": "string"}, {"type": "integer", "minimum": 5}]}, ['"a"', "5"], ["4", "null"]),
    (
        {
            "oneOf": [
                {"properties": {"k": {"const": name}, name: {}}, "required": ["k", name]}
                for name in ("a", "b")
            ],
            "type": "object",
            "discriminator": {"propertyName": "k"},
        },
        ['{"k":"a","a":1}'],
        ['{"k":"a"}', '{"k":"c","a":1}'],
    ),
    (
        {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3},
        ["[1,2]"],
        ["[1]", "[1,2,3,4]"],
    ),
    ({"type": "string"}, ['"\\\\é"', '"\\"é"'], ['"\\é"', '"a\nb"', '"\\x41"']),
    ({"exclusiveMinimum": 2, "maximum": 2.25}, ["2.25", "2.1"], ["2", "2.0", "2.00", "1.9", "3"]),
    ({"allOf": [{"type": "number", "maximum": 2.5}, {"exclusiveMinimum": 2}]}, ["2.5"], ["2", "3"]),
    ({"type": "number", "minimum": -0.25, "exclusiveMaximum": 0}, ["-0.25", "-0.1"], ["-0", "0", "0.0"]),
    ({"minimum": 2, "exclusiveMinimum": True, "maximum": 2.25}, ["2.1"], ["2", "2.0"]),
    ({"exclusiveMinimum": 2, "minimum": 2.2, "maximum": 2.25}, ["2.21"], ["2", "2.1"]),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, ["1", "0.00000001"], ["0", "-0"]),
    ({"type": "integer", "exclusiveMinimum": 1, "maximum": 2.5}, ["2"], ["1", "3"]),
    ({"type": "integer", "multipleOf": 3}, ["6"], ["7"]),
    ({"const": 2**53 - 1}, ["9007199254740991"], ["9007199254740990", "9007199254740992"]),
    ({"enum": [1 - 2**53]}, ["-9007199254740991"], ["-9007199254740990", "-9007199254740992"]),
    ({"type": "integer", "exclusiveMinimum": 2**53 - 1}, ["9007199254740992"], ["9007199254740991"]),
    ({"minimum": 2**53 - 1, "maximum": 2**53 - 1}, ["9007199254740991"], ["9007199254740992"]),
    (
        {"type": "integer", "multipleOf": 4, "default": 10**18},
        ["1000000000000000004"],
        ["1000000000000000002"],
    ),
    ({"const": 0.12345678901234568}, ["0.12345678901234568"], ["0.12345678901234567", "0.1234567890123457"]),
    ({"type": "string", "minProperties": 3, "maxLength": 1}, ['"a"'], ["{}"]),
    ({"type": "array", "uniqueItems": False, "minContains": 1}, ["[1,1]"], ["{}"]),
    (
        {
            **{"if": {"type": "null"}, "not": False, "dependentRequired": {}, "propertyNames": {}},
            **{"type": "object", "properties": {"a": {"then": {"const": 1}, "type": "integer"}}},
            "unevaluatedProperties": True,
        },
        ['{"a":2}'],
        ['{"a":"x"}', "1"],
    ),
    ({"title": "x", "description": "y", "examples": [1], "made-up": 3, "type": "null"}, ["null"], ["1"]),
]


@pytest.mark.parametrize(("schema", "named"), REFUSED, ids=lambda each: str(each)[:50])
def test_what_cannot_be_held_is_refused_by_name(schema: Any, named: str) -> None:
    assert named in refusal(GrammarKind.JSON_SCHEMA, json.dumps(schema))


@pytest.mark.parametrize("schema", ENDLESS, ids=str)
def test_what_no_text_can_end_is_refused(schema: dict[str, Any]) -> None:
    assert "can't end" in refusal(GrammarKind.JSON_SCHEMA, json.dumps(schema))


def test_a_part_that_has_no_text_is_told_as_the_library_tells_it() -> None:
    told = refusal(GrammarKind.JSON_SCHEMA, json.dumps({"$ref": "#/$defs/x", "$defs": {"x": UNMET}}))
    assert told == refusal(GrammarKind.JSON_SCHEMA, json.dumps(UNMET))


@pytest.mark.parametrize(("schema", "text"), ENDING, ids=str)
def test_what_can_end_is_taken(schema: dict[str, Any], text: str) -> None:
    assert accepts(of_schema(schema), text)


@pytest.mark.parametrize(("schema", "good", "bad"), HELD, ids=lambda each: str(each)[:60])
def test_texts_are_held(schema: dict[str, Any], good: list[str], bad: list[str]) -> None:
    grammar = of_schema(schema)
    assert [text for text in good if not accepts(grammar, text)] == []
    assert [text for text in bad if accepts(grammar, text)] == []


BELOW_ONE = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}


@pytest.mark.parametrize(
    ("schema", "finer", "coarser"),
    [
        (
            {"properties": {"price": {"exclusiveMinimum": 0, "type": "number"}, "share": {"maximum": 0.5}}},
            ['{"price":0.00005}'],
            [],
        ),
        ({"properties": {"a": BELOW_ONE}, "items": {"maximum": 1e-300}}, ['{"a":0.00005}'], ['{"a":0}']),
        (
            {
                "allOf": [
                    {"properties": {"a": {"type": "number", "exclusiveMinimum": 0}}},
                    {"properties": {"a": {"$ref": "#/$defs/half"}}},
                ],
                "$defs": {"half": {"maximum": 0.5}},
            },
            [],
            ['{"a":0}', '{"a":0.0}', '{"a":0.6}'],
        ),
        (
            {
                "allOf": [
                    {"additionalProperties": {"type": "number", "exclusiveMinimum": 0}},
                    {"properties": {"a": {"maximum": 0.5}}},
                ]
            },
            [],
            ['{"a":0}', '{"a":0.0}'],
        ),
        (
            {
                "allOf": [
                    {"prefixItems": [{"type": "number", "exclusiveMinimum": 0}]},
                    {"items": {"maximum": 0.5}},
                ]
            },
            [],
            ["[0]", "[0.0]"],
        ),
        (
            {
                "additionalProperties": {"items": {"maximum": 0.5}},
                "patternProperties": {"^a": {"items": {"type": "number", "exclusiveMinimum": 0}}},
            },
            [],
            ['{"a":[0]}', '{"b":[0.6]}'],
        ),
        (
            {
                "properties": {"a": {"type": "number", "exclusiveMinimum": 0}},
                "patternProperties": {"^a": {"maximum": 0.5}},
            },
            [],
            ['{"a":0}', '{"a":0.0}'],
        ),
    ],
    ids=str,
)
def test_bounds_are_moved_by_those_that_they_meet_alone(
    schema: dict[str, Any], finer: list[str], coarser: list[str]
) -> None:
    grammar = of_schema(schema)
    assert [text for text in finer if not accepts(grammar, text)] == []
    assert [text for text in coarser if accepts(grammar, text)] == []


@pytest.mark.parametrize("length", [100, 800])
def test_the_library_is_asked_as_often_for_long_chains_of_references_as_for_short(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them is known to end each time, the last in the schema first."""
    asked, looked = list[object](), list[object]()

    def noted(root: object, reference: str) -> object:
        looked.append(reference)
        return target(root, reference)

    monkeypatch.setattr(ends, "target", noted)
    chain: dict[str, Any] = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}", "minLength": 1} for n in range(length)}
    members = {"a": {"minLength": 1}, "b": {"maxLength": 2}, "again": {"$ref": "#/$defs/d0"}}
    chain[f"d{length}"] = {"type": "object", "properties": members, "required": ["a", "b"]}

    def unsatisfiable(schema: object) -> None:
        asked.append(schema)

    check_schema({"$ref": "#/$defs/d0", "$defs": chain}, unsatisfiable)
    assert len(asked) == 1
    assert len(looked) <= 2 * length + 4


def test_many_parts_that_cannot_be_held_are_not_all_asked_for() -> None:
    asked = list[object]()

    def unsatisfiable(schema: object) -> str:
        asked.append(schema)
        return ""

    members = {f"m{n}": {"minLength": n} for n in range(2000)}
    schema = {"$ref": "#/$defs/a", "$defs": {"a": {"properties": members, "required": list(members), **SELF}}}
    with pytest.raises(GrammarRefused, match=r"\$ref"):
        check_schema(schema, unsatisfiable)
    assert len(asked) <= ends.MOST_ASKED


def test_places_are_spelled_only_where_they_are_told() -> None:
    names: dict[str, Any] = {f"{n:05}": {} for n in range(9000)}
    long = {"properties": {"x" * 150_000: {"properties": names, "required": list(names)}}}
    tracemalloc.start()
    check_schema(long, lambda schema: None)
    assert tracemalloc.get_traced_memory()[1] < 50 << 20
    tracemalloc.stop()


def test_white_space_is_bounded() -> None:
    grammar = of_schema({"type": "object", "properties": {"a": {"type": "array", "items": {"type": "null"}}}})
    for text in (
        '{"a":[null,null]}',
        '{"a": [null, null]}',
        '{\n    "a": [\n        null\n    ]\n}',
        '{\n\t"a": []\n}',
    ):
        assert accepts(grammar, text), text
    for text in ('{  "a":[]}', '{"a":\n\n[]}', ' {"a":[]}', '{"a":[]}\n', "{\n" + " " * 33 + '"a":[]}'):
        assert not accepts(grammar, text), text


def test_sizes_are_bounded() -> None:
    deep: dict[str, Any] = {}
    for _ in range(120):
        deep = {"items": deep}
    assert "nested deeper" in refusal(GrammarKind.JSON_SCHEMA, json.dumps(deep))
    assert "too large" in refusal(GrammarKind.JSON_SCHEMA, json.dumps({"enum": list(range(30_000))}))
    assert "too large" in refusal(GrammarKind.JSON_SCHEMA, json.dumps({"const": "x" * 300_000}))
    assert "characters" in refusal(GrammarKind.REGEX, "x" * 70_000)
    assert refusal(GrammarKind.JSON_SCHEMA, json.dumps({"enum": list(range(500))})) == ""


def test_half_a_character_is_refused() -> None:
    assert "surrogate" in refusal(GrammarKind.JSON_SCHEMA, '{"const": "\\ud800"}')
    for kind in GrammarKind:
        assert "surrogate" in refusal(kind, '"\ud800"')


def test_a_schema_inside_a_grammar_is_held_as_one_outside() -> None:
    grammar = compiled(GrammarKind.LARK, 'start: "<" %json {"type": "integer"} ">"')
    assert accepts(grammar, "<12>")
    assert not accepts(grammar, "<x>")
    for inside, named in (
        ('{"type": "object", "x-guidance": {"lenient": true}}', "x-guidance"),
        ('{"items": {"not": {}}}', "not"),
        ('{"$ref": "#"}', "can't end"),
        ("{", "not JSON"),
    ):
        assert named in refusal(GrammarKind.LARK, f'start: "<" %json {inside} ">"')
