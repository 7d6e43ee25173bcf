"""The papers' workloads by name."""

import pytest

from manylora.loadtest.bench.settings import NAMES, Setting


def test_slora_s_base_point_and_its_parameters() -> None:
    base = Setting.parse("slora")
    assert (str(base.popularity), str(base.arrivals), base.requests) == (
        "power:1",
        "2 requests/s, Poisson",
        600,
    )
    assert str(base.lengths) == "prompts of about 8:512 tokens, 8:512 tokens out"
    assert base.adapters is None
    other = Setting.parse("slora:alpha=0.3,rate=4,cv=2,n=50,duration=60")
    assert (str(other.popularity), str(other.arrivals)) == ("power:0.3", "4 requests/s, Gamma (cv 2)")
    assert (other.requests, other.adapters) == (240, 50)


@pytest.mark.parametrize("name", ["distinct", "uniform", "skewed", "identical"])
def test_punica_s_four_are_closed_loops(name: str) -> None:
    found = Setting.parse(f"punica-{name}:requests=100,streams=16,most=256")
    assert (found.arrivals, found.streams, found.requests) == (None, 16, 100)
    assert max(prompt + answer for prompt, answer in found.lengths.draw(500, 0)) <= 256
    chosen = found.popularity.assign(100, 200, 0)
    assert len(set(chosen)) == {"distinct": 100, "uniform": 10, "skewed": 10, "identical": 1}[name]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("punica", "none of " + ", ".join(NAMES)),
        ("slora:beta=1", "no 'beta'"),
        ("slora:rate=fast", "give a number"),
        ("slora:rate=0", "none"),
        ("slora:cv=-1", "cv"),
        ("punica-skewed:streams=0", "begin at 1"),
    ],
)
def test_what_is_no_setting_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Setting.parse(text)
