"""Servers that aren't asked as OpenAI's is: llama.cpp's list of adapters and LoRAX's own route, on a fake of both."""

import pytest

from manylora.loadtest.bench.popularity import Popularity
from manylora.loadtest.bench.serve import ServeBench, Silent, run_serve
from manylora.loadtest.bench.serve_report import ServeReport
from manylora.loadtest.bench.server_look import BenchError
from manylora.loadtest.bench.workload import Workload
from tests.loadtest.fake_server import FakeServer, running

WORK = Workload(2, Popularity.parse("distinct"), 41, 6, 4, 0, 0)


async def measure(bench: ServeBench) -> ServeReport:
    return ServeReport.of(bench, await run_serve(bench, Silent()))


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
async def test_llama_cpp_is_asked_for_adapters_by_their_place_in_its_list(endpoint: str) -> None:
    with running(FakeServer(lora=("/models/sql.gguf", "/models/pirate.gguf"))) as fake:
        bench = ServeBench(fake.url, WORK, server="llama.cpp", endpoint=endpoint)  # type: ignore[arg-type]
        report = await measure(bench)
    assert (report.succeeded, report.output_tokens) == (4, 24)
    assert report.measured.models == ["sql", "pirate"]
    counted = [body for body in fake.bodies if body["max_tokens"] == 6]
    assert [body["lora"] for body in counted[-4:]] == [[{"id": n, "scale": 1.0}] for n in (0, 1, 0, 1)]
    assert all(body["cache_prompt"] is False for body in counted)


async def test_llama_cpp_s_base_is_asked_on_a_server_without_adapters_only() -> None:
    with running(FakeServer(lora=())) as bare:
        report = await measure(ServeBench(bare.url, WORK, server="llama.cpp"))
    assert report.measured.models == ["base"]
    assert not any("lora" in body for body in bare.bodies)
    refused = pytest.raises(BenchError, match=r"no adapter 'base'.*without --lora")
    with running(FakeServer(lora=("/models/sql.gguf",))) as laden, refused:
        await measure(ServeBench(laden.url, WORK, server="llama.cpp", adapters=("base",)))
    with running(FakeServer()) as other, pytest.raises(BenchError, match=r"no llama\.cpp answers"):
        await measure(ServeBench(other.url, WORK, server="llama.cpp"))


async def test_lorax_takes_adapter_ids_and_streams_tokens_without_an_end() -> None:
    with running(FakeServer()) as fake:
        report = await measure(ServeBench(fake.url, WORK, server="lorax", adapters=("org/sql", "base")))
        cut = await measure(ServeBench(fake.url, WORK, server="lorax", adapters=("org/sql", "cut")))
        with pytest.raises(BenchError, match="name them with --adapters"):
            await measure(ServeBench(fake.url, WORK, server="lorax"))
        with pytest.raises(ValueError, match="no chats"):
            await measure(ServeBench(fake.url, WORK, server="lorax", adapters=("a",), endpoint="chat"))
    assert (report.succeeded, report.output_tokens, report.prompt_tokens.mean) == (4, 24, 41)
    assert report.between_tokens.count == 4 * 5
    asked = [body["parameters"] for body in fake.bodies if "'max_new_tokens': 6" in str(body)]
    assert {"adapter_id": "org/sql", "max_new_tokens": 6, "details": True, "ignore_eos_token": True} in asked
    assert {"max_new_tokens": 6, "details": True, "ignore_eos_token": True} in asked
    assert cut.errors == {"cut off": 2}
