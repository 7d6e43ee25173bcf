"""Mixtures as text: parts, weights, one spelling."""

import math
import struct

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from manylora.adapters.errors import InvalidMixture
from manylora.adapters.mixtures import (
    MixturePart,
    check_parts,
    is_mixture,
    parse_mixture,
    part_weight,
    spell,
)

KNOWN = frozenset(("sql", "pirate", "llama3:latest", "v:2", "sql:0.5"))


def known(name: str) -> bool:
    return name in KNOWN


def single(value: float) -> float:
    found: float = struct.unpack("f", struct.pack("f", value))[0]
    return found


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("sql:0.7+pirate:0.3", [("sql", 0.7), ("pirate", 0.3)]),
        ("sql+pirate", [("sql", 1), ("pirate", 1)]),
        ("sql:2", [("sql", 2)]),
        ("sql:-0.5+pirate:1.5", [("sql", -0.5), ("pirate", 1.5)]),
        ("sql:0+pirate:-0", [("sql", 0), ("pirate", 0)]),
        ("sql:1e-2+pirate:1E1", [("sql", 0.01), ("pirate", 10)]),
        ("sql:.5+pirate:3.", [("sql", 0.5), ("pirate", 3)]),
        ("llama3:latest:0.25+v:2", [("llama3:latest", 0.25), ("v:2", 1)]),
        ("sql:0.5:0.5+sql:0.5", [("sql:0.5", 0.5), ("sql:0.5", 1)]),
        ("sql:0.7 + pirate:0.3", [("sql", 0.7), ("pirate", 0.3)]),
        ("nobody:latest+sql", [("nobody:latest", 1), ("sql", 1)]),
        ("sql:1_0+pirate", [("sql:1_0", 1), ("pirate", 1)]),
        ("sql:٣+pirate", [("sql:٣", 1), ("pirate", 1)]),
    ],
)
def test_parts_and_weights(text: str, parts: list[tuple[str, float]]) -> None:
    assert is_mixture(text, known)
    assert parse_mixture(text, known) == tuple(MixturePart(name, single(weight)) for name, weight in parts)


@pytest.mark.parametrize(
    "text",
    [
        "sql",
        "llama3:latest",
        "v:2",
        "sql:0.5",
        "",
        "llama3",
        "llama3:8",
        "qwen:inf",
        "sql:latest",
        "sql:",
        ":1",
    ],
)
def test_what_is_a_name_or_an_unknown_one_is_no_mixture(text: str) -> None:
    assert not is_mixture(text, known)


@pytest.mark.parametrize("text", ["sql+", "+sql", "sql++pirate", "+", ":0.5+sql"])
def test_a_part_has_a_name(text: str) -> None:
    with pytest.raises(InvalidMixture, match="has no name"):
        parse_mixture(text, known)


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("sql:0.5+pirate:+1.5", "pirate:"),
        ("pirate:1e+3", "pirate:1e"),
        ("sql+v:2:-2.5E+1", "v:2:-2.5E"),
    ],
)
def test_a_plus_in_a_weight_parts_too(text: str, piece: str) -> None:
    with pytest.raises(InvalidMixture, match=f"'{piece}' has no whole weight.*without '\\+'"):
        parse_mixture(text, known)


def test_a_name_that_ends_like_half_a_weight_is_that_name() -> None:
    names = {"sql", "sql:", "sql:1e"}
    assert [part.adapter for part in parse_mixture("sql:+sql:1e+sql", names.__contains__)] == [
        "sql:",
        "sql:1e",
        "sql",
    ]


@pytest.mark.parametrize("weight", ["nan", "inf", "-Infinity", "1e39", "-1e999"])
def test_a_weight_that_is_not_finite_is_refused(weight: str) -> None:
    text = f"sql:{weight}+pirate"
    assert is_mixture(text, known)
    with pytest.raises(InvalidMixture, match=r"'sql'.* finite"):
        parse_mixture(text, known)


def test_a_weight_is_a_float32() -> None:
    assert part_weight("sql", 0.1) == single(0.1) != 0.1
    assert part_weight("sql", 1 + 1e-9) == 1
    assert part_weight("sql", 1e-60) == 0


@pytest.mark.parametrize(
    ("names", "words"),
    [([], "at least one"), (["a", "b", "a"], "'a'.* twice"), (["a", "b", "c", "d"], "4 parts, at most 3")],
)
def test_parts_that_no_mixture_has(names: list[str], words: str) -> None:
    with pytest.raises(InvalidMixture, match=words):
        check_parts([MixturePart(name, 1) for name in names], 3)


def test_messages_stay_short() -> None:
    with pytest.raises(InvalidMixture) as caught:
        part_weight("x" * 100_000, math.nan)
    assert len(caught.value.message) < 1000


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(KNOWN)), st.floats(width=32, allow_nan=False, allow_infinity=False)),
        min_size=1,
        max_size=8,
    )
)
def test_what_is_spelled_is_read_back(parts: list[tuple[str, float]]) -> None:
    mixture = tuple(MixturePart(name, weight) for name, weight in parts)
    assume(not any(known(piece) for piece in spell(mixture).split("+")))
    assert parse_mixture(spell(mixture), known) == mixture


@pytest.mark.parametrize("weight", [3.4028234663852886e38, -3.4028234663852886e38, 3.3999999e38, 1e-45])
def test_the_largest_and_the_smallest_weights_are_spelled(weight: float) -> None:
    parts = (MixturePart("sql", single(weight)), MixturePart("v:2", 1))
    assert parse_mixture(spell(parts), known) == parts
