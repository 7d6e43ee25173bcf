"""Which mixtures a load of them asks for."""

import pytest

from manylora.adapters.mixtures import parse_mixture
from manylora.loadtest.bench.mixed_models import mixed_models
from manylora.loadtest.bench.popularity import Popularity
from manylora.loadtest.bench.serve import ServeBench, Silent, run_serve
from manylora.loadtest.bench.server_look import BenchError
from manylora.loadtest.bench.workload import Workload
from tests.loadtest.fake_server import FakeServer, running

NAMES = [f"a{number}" for number in range(20)]


@pytest.mark.parametrize("adapters", [2, 3, 8, 16, 20])
def test_each_stream_has_another_mixture_of_two_adapters(adapters: int) -> None:
    names = NAMES[:adapters]
    found = [parse_mixture(text, lambda name: name in names) for text in mixed_models(names, 8)]
    assert len(set(found)) == 8
    used = [part.adapter for parts in found for part in parts]
    assert set(used) <= set(names)
    for one, other in found:
        assert one.adapter != other.adapter
        assert one.weight + other.weight == pytest.approx(1)
        assert 0 < other.weight < one.weight < 1
    if adapters >= 16:
        assert len(set(used)) == 16, "two mixtures share an adapter though there are enough"


def test_one_adapter_makes_no_mixture() -> None:
    with pytest.raises(ValueError, match="needs two adapters"):
        mixed_models(["a"], 8)


async def test_a_load_of_mixtures_asks_for_as_many_as_there_are_streams() -> None:
    work = Workload(4, Popularity.parse("mixture"), 41, 6, 12, 0, 0)
    with running(FakeServer()) as fake:
        measured = await run_serve(ServeBench(fake.url, work, ("good", "better")), Silent())
    assert len(measured.models) == 4
    asked = [str(body["model"]) for body in fake.bodies if body["max_tokens"] == 6]
    assert sorted(set(asked)) == sorted(measured.models)
    assert all(asked.count(model) == 5 for model in measured.models), (
        "two of the warm-up and three that count"
    )
    assert "mixtures of two" in measured.chosen_by


async def test_a_server_without_two_adapters_is_told_in_one_line() -> None:
    work = Workload(4, Popularity.parse("mixture"), 41, 6, 12, 0, 0)
    with running(FakeServer()) as fake, pytest.raises((BenchError, ValueError), match="needs two adapters"):
        await run_serve(ServeBench(fake.url, work), Silent())
