"""The three questions of checks.tiers: loads beside streams, first tokens of cold adapters, a thousand adapters."""

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import httpx

from manylora.loadtest.checks.tiers_house import Finding, House
from manylora.loadtest.material.answer import Answer
from manylora.loadtest.material.http_client import Target
from manylora.loadtest.material.http_client import ask as send
from manylora.loadtest.material.manylora_client import Client
from manylora.loadtest.material.standing_load import Refused, StandingLoad

MOST_LOST, MOST_GAP = 0.10, 3.0
MOST_LATER = 0.100
"""Seconds."""
LEAST_KEPT = 0.85
FEW, ROOM = 8, 32
WARM_UP = 6.0
"""Seconds of streams before anything counts."""


async def loads(house: House) -> list[Finding]:
    """Put versions beside running streams, with pauses as long as the loads between them."""
    options = house.options
    names = [f"a{number}" for number in range(options.streams)]
    adapters = [(name, house.adapter(name, seed)) for seed, name in enumerate(names)]
    versions = [house.adapter(f"version{number}", 100 + number) for number in range(2)]
    with house.serving(options.streams + 4, 1.0, adapters) as server:
        load = StandingLoad(server.url, 32, 1500)
        async with Client(server.url) as client, load.running(names):
            await client.register("new", versions[0], preload=True)
            await asyncio.sleep(WARM_UP)
            during: list[tuple[float, float]] = []
            beside: list[tuple[float, float]] = []
            for number in range(options.loads):
                began = time.perf_counter()
                await client.replace("new", versions[(number + 1) % 2])
                ended = time.perf_counter()
                during.append((began, ended))
                await asyncio.sleep(0.15)  # what the last one leaves to do in the background
                paused = time.perf_counter()
                await asyncio.sleep(max(0.5, ended - began))
                beside.append((paused, time.perf_counter()))
    return _report_loads(load, during, beside)


def _report_loads(
    load: StandingLoad, during: list[tuple[float, float]], beside: list[tuple[float, float]]
) -> list[Finding]:
    def rate(spans: Sequence[tuple[float, float]]) -> float:
        seconds = sum(end - start for start, end in spans)
        return sum(load.tokens(start, end).total() for start, end in spans) / seconds

    alone, loading = rate(beside), rate(during)
    lost = 1 - loading / alone
    gaps, usual = load.gaps_within(during), load.gaps_within(beside)
    median, longest = statistics.median(usual), max(gaps)
    took = statistics.median(end - start for start, end in during)
    return [
        Finding("streams without a load, tokens/s", f"{alone:.1f}"),
        Finding(f"while one of {len(during)} loads lasts ({1000 * took:.0f} ms each)", f"{loading:.1f}"),
        Finding("what a load costs", f"{lost:.1%}", f"≤ {MOST_LOST:.0%}", lost <= MOST_LOST),
        Finding(
            "longest gap in a load",
            f"{1000 * longest:.0f} ms, {longest / median:.2f} medians",
            f"≤ {MOST_GAP:g}",
            longest <= MOST_GAP * median,
        ),
        Finding("and without", f"{1000 * max(usual):.0f} ms, {max(usual) / median:.2f} medians"),
    ]


async def cold(house: House) -> list[Finding]:
    """Ask adapters for a token when they are on disk, and again when they are on the device; beside streams too."""
    options = house.options
    names = [f"a{number}" for number in range(options.asked)]
    adapters = [(name, house.adapter(name, seed)) for seed, name in enumerate(names)]
    findings: list[Finding] = []
    # Room for four, of which streams have two, and for two on the host.
    host = 2.5 * _adapter_gib(adapters[0][1])
    with house.serving(4, host, adapters) as server:
        findings += _report_cold(await _first_tokens(server.url, names[2:]), "")
        load = StandingLoad(server.url, 32, 1500)
        async with load.running([names[number % 2] for number in range(4)]):
            await asyncio.sleep(WARM_UP)
            findings += _report_cold(await _first_tokens(server.url, names[2:]), " beside 4 streams")
    return findings


async def _first_tokens(url: str, names: Sequence[str]) -> list[tuple[float, float]]:
    """Return, for each asking, the seconds of the first token from disk and from the device."""
    found: list[tuple[float, float]] = []
    async with httpx.AsyncClient(timeout=60) as client:
        await _first_token(client, url, names[0], 0)
        for number, name in enumerate([*names[1:], *names, *names]):
            if await _tier(client, url, name) != "disk":
                continue
            first = await _first_token(client, url, name, 2 * number + 1)
            found.append((first, await _first_token(client, url, name, 2 * number + 2)))
    return found


async def _first_token(client: httpx.AsyncClient, url: str, name: str, number: int) -> float:
    answer = await _ask(client, url, name, number, input_tokens=32, output_tokens=2)
    assert answer.first_token_seconds is not None
    return answer.first_token_seconds


async def _ask(
    client: httpx.AsyncClient, url: str, name: str, number: int, *, input_tokens: int, output_tokens: int
) -> Answer:
    body = {
        "model": name,
        "prompt": [500 + 3 * number, *range(20, 19 + input_tokens)],
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    answer = await send(client, Target(url), body)
    if not answer.complete:
        raise Refused(f"{name}: {answer.error} {answer.error_message}")
    return answer


async def _tier(client: httpx.AsyncClient, url: str, name: str) -> str:
    return str((await client.get(f"{url}/adapters/{name}")).json()["tier"])


def _adapter_gib(directory: str) -> float:
    return (Path(directory) / "adapter_model.safetensors").stat().st_size / (1 << 30)


def _report_cold(found: list[tuple[float, float]], where: str) -> list[Finding]:
    later = sorted(first - second for first, second in found)
    middle, late = statistics.median(later), later[int(0.9 * (len(later) - 1))]
    warm = statistics.median(second for _, second in found)
    return [
        Finding(f"first token of a warm adapter{where}", f"{1000 * warm:.0f} ms"),
        Finding(
            f"of one from disk{where}, later by ({len(found)} askings)",
            f"{1000 * middle:.0f} ms, nine of ten up to {1000 * late:.0f} ms",
            f"≤ {1000 * MOST_LATER:.0f} ms",
            middle <= MOST_LATER,
        ),
    ]


async def zipf(house: House) -> list[Finding]:
    """Ask few adapters and many by turns, in Zipf's order, in a closed loop."""
    options = house.options
    source = house.adapter("a0", 0)
    names = ["a0", *(f"a{number}" for number in range(1, options.adapters))]
    with house.serving(ROOM, 2.0, [("a0", source)]) as server:
        async with Client(server.url) as client:
            for number, name in enumerate(names[1:], start=1):
                await client.register(name, house.twin(name, source, number))
        rates: dict[str, list[float]] = {"few": [], "many": []}
        async with httpx.AsyncClient(timeout=300) as http:
            await _round(house, http, server.url, names[:FEW], 0)
            for number in range(1, options.rounds + 1):
                for kind in ("few", "many") if number % 2 else ("many", "few"):
                    asked = names[:FEW] if kind == "few" else names
                    rates[kind].append(await _round(house, http, server.url, asked, number))
        async with Client(server.url) as client:
            metrics = await client.metrics()
    few, many = (statistics.median(rates[kind]) for kind in ("few", "many"))
    kept = statistics.median(m / f for m, f in zip(rates["many"], rates["few"], strict=True))
    count = "manylora_adapter_load_seconds_count"
    moves = [metrics.total(count, f'operation="{kind}"') for kind in ("read", "place")]
    return [
        Finding(f"{FEW} adapters in Zipf's order, tokens/s", f"{few:.1f}"),
        Finding(f"{len(names)}, room for {ROOM}", f"{many:.1f}"),
        Finding(f"{moves[0]:.0f} reads from disk, {moves[1]:.0f} copies to the device", ""),
        Finding(
            "of that with few, median of the rounds", f"{kept:.3f}", f"≥ {LEAST_KEPT:g}", kept >= LEAST_KEPT
        ),
    ]


async def _round(house: House, client: httpx.AsyncClient, url: str, names: Sequence[str], seed: int) -> float:
    """Return the tokens a second of a closed loop over adapters in Zipf's order."""
    options = house.options
    rng = random.Random(seed)
    order = rng.choices(names, [1 / rank for rank in range(1, len(names) + 1)], k=options.requests)
    waiting = iter(enumerate(order))

    async def stream() -> int:
        made = 0
        for number, name in waiting:
            asked = 1000 * seed + number
            answer = await _ask(client, url, name, asked, input_tokens=64, output_tokens=64)
            made += answer.output_tokens
        return made

    began = time.perf_counter()
    made = await asyncio.gather(*(stream() for _ in range(options.streams)))
    return sum(made) / (time.perf_counter() - began)
