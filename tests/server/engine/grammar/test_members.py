"""Members of objects: those that patterns name, those that are counted, and very many that may be left out."""

import json
from typing import Any

import pytest

from manylora.server.engine.grammar import GrammarFault, GrammarKind
from manylora.server.engine.grammar.members import MOST_OPTIONAL
from tests.server.engine.grammar.texts import accepts, of_schema, refusal

BOOLEAN = {"type": "boolean"}
CLOSED: dict[str, Any] = {"type": "object", "additionalProperties": False}


def refused(schema: dict[str, Any]) -> str:
    return refusal(GrammarKind.JSON_SCHEMA, json.dumps(schema))


@pytest.mark.parametrize(
    "schema",
    [
        {**CLOSED, "patternProperties": {"^[ab]$": BOOLEAN}, "minProperties": 2},
        {"type": "object", "minProperties": 2},
        {"minProperties": 3, "properties": {"a": {}}, "required": ["a"]},
        {"allOf": [{"minProperties": 2}, {"patternProperties": {"^[ab]$": BOOLEAN}}]},
    ],
    ids=str,
)
def test_members_that_may_come_twice_are_not_counted(schema: dict[str, Any]) -> None:
    assert "minProperties at #" in refused(schema)


def test_one_member_beside_those_that_are_required_is_one_however_often_it_comes() -> None:
    grammar = of_schema({"type": "object", "minProperties": 2, "properties": {"a": {}}, "required": ["a"]})
    assert accepts(grammar, '{"a":1,"b":2}')
    assert not accepts(grammar, '{"a":1}')
    assert not accepts(grammar, '{"a":1,"a":2}')


@pytest.mark.parametrize("beside", [{"required": ["c"]}, {"properties": {"c": {"enum": [True, 3]}}}], ids=str)
def test_a_pattern_of_one_name_is_the_member_of_that_name(beside: dict[str, Any]) -> None:
    """Where the pattern stayed, a comma could follow it and nothing that."""
    grammar = of_schema({**CLOSED, "patternProperties": {"^c$": BOOLEAN}, **beside})
    assert accepts(grammar, '{"c":true}')
    assert not accepts(grammar, '{"c":3}')
    assert not accepts(grammar, '{"c":true,')
    matcher = grammar.matcher((), 0)
    for byte in b'{"c":true':
        matcher.take(byte)
    with pytest.raises(GrammarFault):
        matcher.take(ord(","))


def members(count: int) -> dict[str, Any]:
    return {f"m{number}": {"type": "integer"} for number in range(count)}


@pytest.mark.parametrize(
    ("schema", "taken"),
    [
        ({"properties": members(MOST_OPTIONAL)}, True),
        ({"properties": members(MOST_OPTIONAL + 1)}, False),
        ({**CLOSED, "properties": members(MOST_OPTIONAL + 1)}, False),
        ({"items": {"properties": members(MOST_OPTIONAL + 1), "required": ["m0"]}}, True),
        ({"items": {"properties": members(MOST_OPTIONAL + 2), "required": ["m0"]}}, False),
        ({"properties": members(3000), "required": list(members(3000))}, True),
        (
            {
                "properties": {"a": {}},
                "allOf": [{"$ref": "#/$defs/a"}],
                "$defs": {"a": {"properties": members(MOST_OPTIONAL)}},
            },
            False,
        ),
    ],
    ids=[
        "so many",
        "one more",
        "and no others",
        "after one that must be there",
        "one more than that",
        "required",
        "merged",
    ],
)
def test_so_many_members_may_be_left_out_and_no_more(schema: dict[str, Any], taken: bool) -> None:
    if not taken:
        assert "that may be left out" in refused({"type": "object", **schema})
        return
    assert accepts(
        of_schema({"type": ["object", "array"], **schema}),
        "{" + ",".join(f'"m{n}":1' for n in range(len(schema.get("properties", ())))) + "}",
    )


@pytest.mark.parametrize("word", ["anyOf", "oneOf"])
def test_so_many_may_come_first_in_a_choice_and_no_more(word: str) -> None:
    def choice(required: list[str]) -> dict[str, Any]:
        kinds = ({"kind": {"const": kind}, **members(300)} for kind in "ab")
        return {word: [{"type": "object", "properties": each, "required": required} for each in kinds]}

    assert f"{word} at #" in refused(choice(["m299"]))
    assert accepts(of_schema(choice(["kind", "m299"])), '{"kind":"a","m1":1,"m299":1}')
