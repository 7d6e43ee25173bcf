"""Examples are read in the background, once; requests wait a while for them, and then choose among what is there."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from manylora.adapters.manifest import AdapterManifest
from manylora.server.catalog import Described, Routed, Routing
from manylora.server.catalog.example_vectors import ExampleVectors, Vectors
from manylora.server.catalog.nearest import Board, Group
from manylora.server.catalog.prompt_vectors import Floats
from manylora.server.catalog.routing import RoutingSettings
from manylora.server.catalog.said import Said
from manylora.server.errors import AdapterUnavailable, NotFinite, QueueFull

FORMS = ("chat", "plain")
WORDS = ("select", "brace", "arr", "what")


def vector(text: str) -> Floats:
    """A made-up model's: what all texts have, and which words are in this one."""
    return np.array([5.0, *(float(text.count(word)) for word in WORDS)], dtype=np.float32)


def adapter(name: str, *examples: str, threshold: float | None = None) -> Described:
    return Described(name, AdapterManifest(None, examples, threshold))


SQL = adapter("sql", "select it", "select that", "do select")
JSON = adapter("json", "brace it", "a brace")
PIRATE = adapter("pirate", "arr arr", "arr matey")
BASE = AdapterManifest(examples=("what is it?", "what?"))


class Bench:
    """A routing over adapters that come and go, with a model that can be held, and fail."""

    def __init__(self, directory: Path | None = None, most: int = 1 << 20, patience: float = 5.0) -> None:
        settings = RoutingSettings("demo", BASE, FORMS, 0.3, patience)
        self.routing = Routing(ExampleVectors(directory, "key", 5, most), settings, Said(directory))
        self.adapters: list[Described] = []
        self.computed: list[Sequence[str]] = []
        self.go = asyncio.Event()
        self.go.set()
        self.errors: list[Exception] = []

    async def compute(self, examples: Sequence[str]) -> Vectors:
        await self.go.wait()
        self.computed.append(tuple(examples))
        if self.errors:
            raise self.errors.pop(0)
        rows = np.stack([vector(each) for each in examples])
        return dict.fromkeys(FORMS, rows.astype(np.float16))

    def have(self, *adapters: Described) -> None:
        self.adapters[:] = adapters
        self.routing.look()

    async def chosen(self, text: str, *candidates: Described) -> str:
        return (await self.routed(text, *candidates)).name

    async def routed(self, text: str, *candidates: Described) -> Routed:
        contest = await self.routing.ready(self.routing.candidates(candidates))
        return await self.routing.choose(contest, "chat", vector(text))


@contextlib.asynccontextmanager
async def bench(
    directory: Path | None = None, most: int = 1 << 20, patience: float = 5.0
) -> AsyncIterator[Bench]:
    made = Bench(directory, most, patience)
    await made.routing.open((), lambda: tuple(made.adapters), made.compute)
    try:
        yield made
    finally:
        await made.routing.close()


async def test_a_prompt_goes_to_the_adapter_of_such_examples_and_others_to_the_base() -> None:
    async with bench() as it:
        it.have(SQL, JSON, PIRATE)
        texts = {"select mine": "sql", "brace yourself": "json", "arr?": "pirate", "what now?": "demo"}
        assert {text: await it.chosen(text, SQL, JSON, PIRATE) for text in texts} == texts
        assert it.computed.count(SQL.manifest.examples) == 1


async def test_only_candidates_are_chosen_and_nobody_elses_examples_matter() -> None:
    async with bench() as it:
        it.have(SQL, JSON)
        alone = await it.routed("select brace", JSON)
        it.have(SQL, JSON, PIRATE)
        await it.routing.ready([PIRATE])
        assert await it.routed("select brace", JSON) == alone
        assert alone.nearest == "json"


async def test_who_is_not_near_enough_is_not_chosen_and_an_adapter_may_say_what_is() -> None:
    strict = adapter("strict", "select it", threshold=1.0)
    easy = adapter("easy", "select it", threshold=-1.0)
    async with bench() as it:
        it.have(strict, easy)
        assert await it.chosen("select arr arr", strict) == "demo"
        assert await it.chosen("select arr arr", easy) == "easy"
        routed = await it.routed("select arr arr", strict)
        assert (routed.nearest, routed.threshold) == ("strict", 1.0)
        assert routed.second is not None
        assert routed.second.name == "demo"


async def test_what_is_said_is_read_before_anybody_asks() -> None:
    async with bench() as it:
        it.have(SQL, Described("json", AdapterManifest()))
        await it.routing.ready([SQL])
        await it.routing.say("json", JSON.manifest)
        for _ in range(10_000):
            if JSON.manifest.examples in it.computed:
                break
            await asyncio.sleep(0.001)
        assert JSON.manifest.examples in it.computed


async def test_nothing_is_read_any_more_once_it_is_closed() -> None:
    async with bench() as it:
        it.have(SQL)
        await it.routing.ready([SQL])
    it.have(SQL, JSON)
    await asyncio.sleep(0.01)
    assert JSON.manifest.examples not in it.computed


async def test_how_candidates_compare_is_kept_for_those_asked_for_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []

    class Counted(Board):
        def __init__(self, groups: Sequence[Group]) -> None:
            super().__init__(groups)
            made.append(len(groups))

    monkeypatch.setattr("manylora.server.catalog.routing.Board", Counted)
    monkeypatch.setattr("manylora.server.catalog.routing.BOARDS", 2)
    async with bench() as it:
        it.have(SQL, JSON, PIRATE)
        await until(it, SQL, JSON, PIRATE)
        for candidate in (SQL, JSON, SQL, PIRATE, SQL, JSON):
            await it.routed("select", candidate)
    assert made == [2] * 4, "of SQL once, and of JSON again"


async def test_what_is_said_of_an_adapter_counts_over_what_its_files_say() -> None:
    async with bench() as it:
        it.have(SQL, JSON)
        await it.routing.say("json", AdapterManifest(examples=("arr", "arr arr")))
        await until(it, *it.routing.candidates([SQL, JSON]))
        assert [await it.chosen(text, SQL, JSON) for text in ("arr", "select")] == ["json", "sql"]
        await it.routing.say("json", AdapterManifest("says what it is for, and is never chosen"))
        assert it.routing.candidates([SQL, JSON]) == (SQL,)
        it.routing.look("json")  # another adapter has the name
        assert it.routing.candidates([SQL, JSON]) == (SQL, JSON)


async def test_a_request_keeps_to_the_candidates_that_it_began_with() -> None:
    async with bench() as it:
        it.have(SQL, JSON)
        contest = await it.routing.ready([SQL, JSON])
        it.have(PIRATE)
        await until(it, PIRATE)
        assert (await it.routing.choose(contest, "plain", vector("brace"))).name == "json"


async def test_a_request_waits_for_examples_that_are_being_read() -> None:
    async with bench() as it:
        it.go.clear()
        it.have(SQL)
        asked = asyncio.create_task(it.chosen("select", SQL))
        await asyncio.sleep(0)
        assert not asked.done()
        it.go.set()
        assert await asked == "sql"


async def test_one_that_waited_long_enough_is_told_to_try_again() -> None:
    async with bench(patience=0.0) as it:
        it.go.clear()
        it.have(SQL)
        with pytest.raises(AdapterUnavailable, match="still being read: try again") as told:
            await it.routing.ready([SQL])
        assert told.value.retry_after == 1


async def test_those_that_are_not_read_yet_are_no_candidates_yet() -> None:
    async with bench(patience=0.0) as it:
        it.have(SQL)
        await until(it, SQL)
        it.go.clear()
        it.have(SQL, JSON)
        assert (await it.routing.ready([SQL, JSON])).candidates == (SQL,)


async def until(it: Bench, *adapters: Described) -> None:
    """Wait until the examples of these are read, without any patience."""
    for _ in range(10_000):
        with contextlib.suppress(AdapterUnavailable):
            if (await it.routing.ready(adapters)).candidates == adapters:
                return
        await asyncio.sleep(0.001)
    raise AssertionError("never read")


async def test_examples_that_can_not_be_read_say_why_and_are_tried_again_after_a_change() -> None:
    async with bench() as it:
        it.errors = [NotFinite("not finite")]
        it.have(SQL)
        for _ in range(2):
            with pytest.raises(AdapterUnavailable, match="not finite; name a model"):
                await it.routing.ready([SQL])
        it.have(SQL, JSON)
        await until(it, SQL, JSON)


async def test_a_full_queue_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manylora.server.catalog.routing.AGAIN", 0.0)
    async with bench() as it:
        it.errors = [QueueFull("full"), QueueFull("full")]
        it.have(SQL)
        assert await it.chosen("select", SQL) == "sql"


async def test_the_next_start_computes_nothing_again_and_what_is_gone_goes(tmp_path: Path) -> None:
    async with bench(tmp_path) as it:
        it.have(SQL, JSON)
        await it.routing.ready([SQL, JSON])
    async with bench(tmp_path) as it:
        it.have(SQL, JSON)
        assert await it.chosen("brace", SQL, JSON) == "json"
        assert it.computed == []
        it.have(SQL)
        await until_there_are(2, tmp_path)  # the base's own are the other
        it.have()
        await until_there_are(0, tmp_path)


async def until_there_are(count: int, directory: Path) -> None:
    for _ in range(10_000):
        if len(os.listdir(directory)) == count:
            return
        await asyncio.sleep(0.001)
    raise AssertionError("what is gone is still there")


async def test_one_that_goes_and_comes_back_otherwise_is_read_anew() -> None:
    other = adapter("sql", "arr")
    async with bench() as it:
        it.have(SQL)
        assert await it.chosen("arr", SQL) == "demo"
        it.have(other)
        assert await it.chosen("arr", other) == "sql"


async def test_memory_for_examples_is_bounded_and_who_finds_none_is_told() -> None:
    async with bench(most=2 * 5 * 2 * (2 + 3)) as it:  # the base's two and one adapter's three
        it.have(SQL)
        assert await it.chosen("select", SQL) == "sql"
        it.have(SQL, JSON)
        with pytest.raises(AdapterUnavailable, match="no memory"):
            await it.routing.ready([JSON])
        assert await it.chosen("select", SQL, JSON) == "sql"


async def test_a_server_whose_adapters_have_no_examples_computes_nothing() -> None:
    async with bench() as it:
        it.have()
        await asyncio.sleep(0.01)
        assert it.computed == []
