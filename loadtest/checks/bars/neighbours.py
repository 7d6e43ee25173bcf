"""Bar 4: what happens to one adapter is noticed by nobody else, and a name that comes back brings nothing along."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from manylora.loadtest.checks.bars.base_speed import SpeedSize, base_speed
from manylora.loadtest.checks.bars.material import RANKS, TARGETS, Material, prompts
from manylora.loadtest.checks.bars.quiet import NOTHING, quiet, report_books
from manylora.loadtest.checks.bars.report import Report
from manylora.loadtest.material.manylora_client import Ask, Client
from manylora.loadtest.material.server_process import ServerProcess, running, start_server
from manylora.server.kernels.choose import PLAIN

# Few rows, so that the others' coming and going evicts and moves what is on the device.
FLAGS = ("--kv-cache-gib", "0.1", "--arena-rows", "160")
AT_ONCE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class NeighboursSize:
    """How much is done."""

    others: int = 100
    max_tokens: int = 400
    registrations: int = 50
    speed: SpeedSize = field(default_factory=SpeedSize)


SMALL = NeighboursSize(
    others=20,
    max_tokens=80,
    registrations=50,
    speed=SpeedSize(adapters=60, rounds=4, max_tokens=8, judged=False),
)


async def neighbours(directory: Path, size: NeighboursSize, kernels: str = PLAIN) -> Report:
    """Run the bar in ``directory``."""
    report = Report("4. Nobody notices the neighbours")
    material = Material.make(directory, kernels)
    flags = material.arguments(*FLAGS)
    one, other = (start_server(material.base, directory / name, flags) for name in ("one", "other"))
    with running(one, other):
        async with Client(one.url) as client, Client(other.url) as cold:
            await _undisturbed(report, client, material, size)
            await _back_under_its_name(report, client, cold, material)
            await _choices_then_delete(report, client, material)
            await _registered_by_many(report, client, one, material, size)
            await base_speed(report, (client, cold), material.base.name, material.adapter(1), size.speed)
            for each in (client, cold):
                left = await quiet(each)
                report.check("idle, nothing is held", str(left), left == NOTHING)
                await report_books(report, each)
    return report


async def _undisturbed(report: Report, client: Client, material: Material, size: NeighboursSize) -> None:
    """Decode with the base and with an adapter, alone and then while others come and go."""
    await client.register("mine", material.adapter(0, 24, TARGETS[2]))
    (prompt,) = prompts([70], seed=10)
    for model in (material.base.name, "mine"):
        ask = Ask(model, prompt, size.max_tokens)
        alone = await client.stream(ask)
        others = asyncio.create_task(_come_and_go(client, material, size.others))
        beside = []
        while not others.done():  # one stream after the other, so that there is one all the time
            beside.append(await client.stream(ask))
        await others
        report.share(
            f"{model}: streams of {size.max_tokens} tokens are the same while {size.others} adapters come and go",
            sum(answer.same_as(alone) for answer in beside),
            len(beside),
        )
    await client.delete("mine")


async def _come_and_go(client: Client, material: Material, count: int) -> None:
    """Load adapters and delete them; some stay for a while, so that gaps open in the arena."""
    for number in range(count):
        source = material.adapter(1 + number, RANKS[number % len(RANKS)], TARGETS[number % len(TARGETS)])
        await client.register(f"other{number}", source, preload=True)
        if number % 3:
            await client.delete(f"other{number}")
        elif number:
            await client.delete(f"other{number - 3}")
    await client.delete(f"other{(count - 1) // 3 * 3}")


async def _back_under_its_name(report: Report, client: Client, cold: Client, material: Material) -> None:
    """Fill the prefix cache under a name, then give the name other weights: by delete and register, and by replace."""
    first, second = material.adapter(1, 16, TARGETS[1]), material.adapter(2, 16, TARGETS[1])
    asks = [Ask("again", prompt, 16) for prompt in prompts([16, 64, 150, 290], seed=11)]
    await cold.register("again", second)
    expected = [await cold.complete(ask) for ask in asks]
    await cold.delete("again")
    for way in ("deleted and registered", "replaced"):
        await client.register("again", first)
        before = [await client.complete(ask) for _ in range(2) for ask in asks][len(asks) :]
        if way == "replaced":
            await client.replace("again", second)
        else:
            await client.delete("again")
            await client.register("again", second)
        after = [await client.complete(ask) for ask in asks]
        good = [a.same_as(e) and not b.same_as(e) for a, b, e in zip(after, before, expected, strict=True)]
        report.share(
            f"{way} with other weights, prefixes cached: the answers of a cold server", sum(good), len(good)
        )
        await client.delete("again")


async def _choices_then_delete(report: Report, client: Client, material: Material) -> None:
    """Let requests with four choices end, fail at the door and be left, then delete their adapter."""
    await client.register("four", material.adapter(3))
    asks = [Ask("four", prompt, 16, n=4) for prompt in prompts([5, 40, 90, 130], seed=12)]
    answers = await asyncio.gather(*(client.choices(ask) for ask in asks))
    await asyncio.gather(*(client.stream(ask, hang_up_after=5) for ask in asks))
    complete = [len(choices) == 4 and all(c.same_as(choices[0]) for c in choices) for choices in answers]
    report.share("greedy n = 4 gives four equal choices", sum(complete), len(complete))
    began = time.monotonic()
    try:
        async with asyncio.timeout(30):
            await client.delete("four")
        seconds = time.monotonic() - began
    except TimeoutError:
        seconds = float("inf")
    report.check(
        f"n = 4 traffic, then delete: returns at once (under {AT_ONCE_SECONDS:g} s)",
        f"{1000 * seconds:.0f} ms",
        seconds < AT_ONCE_SECONDS,
    )


async def _registered_by_many(
    report: Report, client: Client, server: ServerProcess, material: Material, size: NeighboursSize
) -> None:
    """Register the same adapter from many clients at once, under one name and under many."""
    source, count = material.adapter(4), size.registrations
    for kind, names in (("one name", ["same"] * count), ("a name each", [f"same{i}" for i in range(count)])):
        ids = await _register_all(server, names, source)
        files = server.stored_files()
        distinct = len(set(names))
        report.check(
            f"{count} clients register one adapter at once under {kind}: one copy, an id per name",
            f"{len(ids)} ids, {files} files in the store",
            len(ids) == distinct and files == 2,
        )
        for name in set(names):
            await client.delete(name)
    report.check(
        "and no file stays when all are deleted", str(server.stored_files()), server.stored_files() == 0
    )


async def _register_all(server: ServerProcess, names: Sequence[str], source: str) -> set[int]:
    """Register from a connection each, all at the same time."""
    clients = [Client(server.url) for _ in names]
    try:
        records = await asyncio.gather(
            *(client.register(name, source) for client, name in zip(clients, names, strict=True))
        )
    except httpx.HTTPStatusError as error:
        raise AssertionError(f"a registration failed: {error}") from error
    finally:
        for client in clients:
            await client.close()
    return {int(record["id"]) for record in records}
