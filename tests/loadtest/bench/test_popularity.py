"""Popularity: pure, seeded, in range, and what the papers and tools say by these names."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.loadtest.bench.popularity import PLAIN, Popularity, PopularityError

CHOICES = [*PLAIN, "zipf:0", "zipf:1.1", "power:1", "power:0.1"]
MANY = 20_000


def shares(text: str, adapters: int, requests: int = MANY) -> list[float]:
    counts = Counter(Popularity.parse(text).assign(requests, adapters, 7))
    return [counts[adapter] / requests for adapter in range(adapters)]


@given(
    st.sampled_from(CHOICES), st.integers(0, 60), st.integers(1, 40), st.integers(min_value=0, max_value=999)
)
def test_every_request_gets_an_adapter_and_the_same_one_again(
    text: str, requests: int, adapters: int, seed: int
) -> None:
    popularity = Popularity.parse(text)
    chosen = popularity.assign(requests, adapters, seed)
    assert len(chosen) == requests
    assert all(0 <= adapter < adapters for adapter in chosen)
    assert chosen == popularity.assign(requests, adapters, seed)


def test_seeds_differ() -> None:
    popularity = Popularity.parse("uniform")
    assert popularity.assign(50, 8, 1) != popularity.assign(50, 8, 2)


def test_identical_and_distinct() -> None:
    assert Popularity.parse("identical").assign(5, 3, 0) == [0] * 5
    assert Popularity.parse("distinct").assign(5, 3, 0) == [0, 1, 2, 0, 1]
    assert Popularity.parse("distinct").assign(4, 4, 0) == [0, 1, 2, 3]


@pytest.mark.parametrize("text", ["uniform", "zipf:0", "power:1"])
def test_uniform_by_each_name(text: str) -> None:
    assert shares(text, 8) == pytest.approx([1 / 8] * 8, abs=0.015)


def test_zipf_follows_its_law() -> None:
    weights = [1 / (i + 1) for i in range(8)]
    expected = [weight / sum(weights) for weight in weights]
    assert shares("zipf:1", 8) == pytest.approx(expected, abs=0.015)


def test_skewed_falls_by_half_again() -> None:
    weights = [1.5**-i for i in range(6)]
    assert shares("skewed", 6) == pytest.approx([w / sum(weights) for w in weights], abs=0.015)


def test_power_has_slora_s_distribution() -> None:
    """P(adapter < k) = (k/n)^α."""
    found = shares("power:0.3", 10)
    assert sum(found[:1]) == pytest.approx(0.1**0.3, abs=0.015)
    assert sum(found[:5]) == pytest.approx(0.5**0.3, abs=0.015)


def test_punica_uniform_uses_the_root_of_the_requests() -> None:
    counts = Counter(Popularity.parse("punica-uniform").assign(30, 100, 0))
    assert len(counts) == 6
    assert set(counts.values()) == {5}


def test_punica_skewed_grows_by_half() -> None:
    counts = Counter(Popularity.parse("punica-skewed").assign(32, 100, 0))
    assert [counts[k] for k in range(8)] == [1, 1, 2, 3, 5, 7, 11, 2]
    crowded = Counter(Popularity.parse("punica-skewed").assign(32, 3, 0))
    assert [crowded[k] for k in range(3)] == [1, 1, 30]


@pytest.mark.parametrize(
    "text", ["", "zip", "zipf", "zipf:", "zipf:x", "zipf:-1", "power:0", "power:nan", "uniform:1"]
)
def test_what_is_none_is_refused_by_name(text: str) -> None:
    with pytest.raises(PopularityError, match="ALPHA"):
        Popularity.parse(text)


def test_it_reads_what_it_writes() -> None:
    for text in CHOICES:
        assert Popularity.parse(str(Popularity.parse(text))) == Popularity.parse(text)
