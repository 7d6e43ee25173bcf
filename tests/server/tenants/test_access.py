"""Which names patterns let through."""

import pytest

from manylora.adapters.errors import InvalidKey
from manylora.adapters.keys import KeyTerms, Right
from manylora.server.tenants.access import Access

TENANTS = frozenset({"acme", "globex"})


def access(*patterns: str, manages: bool = False) -> Access:
    return Access("acme", patterns, manages=manages, tenants=lambda: TENANTS)


@pytest.mark.parametrize(
    ("patterns", "seen", "unseen"),
    [
        (("*",), ["base", "sql", "team/sql", "acme/x", "acme"], ["globex/x", "globex/y/z"]),
        (("sql*",), ["sql", "sql-2"], ["nosql", "SQL", "acme/sql"]),
        (("s?l",), ["sql"], ["sl", "sqql"]),
        (("acme/*",), ["acme/x", "acme/y/z"], ["acme", "acme2/x", "globex/x"]),
        (("glob*", "*/x", "?lobex/x"), ["globe", "acme/x"], ["globex/x"]),
        (("globex/x",), ["globex/x"], ["globex/y", "globex/x2"]),
        (("globex/*",), ["globex/x"], ["sql"]),
        (("a.b",), ["a.b"], ["axb"]),
    ],
)
def test_patterns(patterns: tuple[str, ...], seen: list[str], unseen: list[str]) -> None:
    found = access(*patterns)
    assert [name for name in seen + unseen if found.allows(name)] == seen


def test_a_version_is_that_one_alone() -> None:
    found = access("sql@3", "pir*@2")
    assert [found.allows("sql", version) for version in (1, 3, None)] == [False, True, False]
    assert found.allows("pirate", 2)
    assert not found.allows("pirate", 1)


def test_who_manages_a_namespace_sees_it() -> None:
    assert access("sql", manages=True).allows("acme/x")
    assert not access("sql").allows("acme/x")
    assert not access("sql", manages=True).allows("acme")


def test_many_stars_take_no_time() -> None:
    assert not access("*a" * 60).allows("a" * 59 + "b" * 60)


@pytest.mark.parametrize(
    "terms",
    [
        {"tenant": ""},
        {"tenant": "a/b"},
        {"tenant": "../x"},
        {"tenant": "."},
        {"tenant": "x" * 65},
        {"models": ()},
        {"models": ("[ab]",)},
        {"models": ("sql@0",)},
        {"models": ("sql@x",)},
        {"rights": frozenset()},
        {"budget": 0},
        {"parallel": -1},
        {"weight": 0.0},
        {"weight": float("nan")},
        {"adapter_rows": -1},
    ],
)
def test_terms_that_make_no_sense(terms: dict[str, object]) -> None:
    with pytest.raises(InvalidKey):
        KeyTerms(**{"tenant": "acme", "rights": frozenset({Right.INFER}), **terms})  # type: ignore[arg-type]
