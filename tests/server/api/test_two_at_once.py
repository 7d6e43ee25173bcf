"""Two changes of one name at the same time, at each place where one may have to wait: one wins, the other is told.

Whatever the two meet in, the answers and what is there afterwards are those of one after the other. Registry, files and
engine say the same, and so does the disk once the server has ended.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from manylora.adapters.fsck.check import check
from manylora.server.engine.async_engine import AsyncEngine
from tests.server.api.running import SECONDS, Files, Running, running

NAME, MIXTURE, OTHER = "x", "m", "other"
PLACES = ("manylora.adapters.", "manylora.server.catalog.")
READING = ("digest_of", "_identify", "is_intact", "keep_space", "keep_only")
"""What only looks, or belongs to nobody's change: nothing can go wrong there that doesn't just before or after."""
ENGINE = ("add_adapter", "keep_adapter", "rest_adapter", "remove_adapter")
QUIET = 60
"""Turns of the loop in which nothing happens, after which nothing will until something is let go on."""
WHO: ContextVar[str] = ContextVar("who", default="")
"""Whose change this is: tasks have it from the one that began them."""


@dataclass
class Turnstile:
    """Every wait of a change for a thread or for the engine, at one of which it is held."""

    whom: str = ""
    at: int | None = None
    passed: int = 0
    inside: int = 0
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    def hold(self, whom: str, at: int | None) -> None:
        """Hold one from now on at the place that it comes to after so many."""
        self.whom, self.at, self.passed = whom, at, 0
        self.reached, self.go_on = asyncio.Event(), asyncio.Event()

    async def place(self) -> None:
        """Be held here, if it is here."""
        if WHO.get() != self.whom:
            return
        self.passed += 1
        if self.at == self.passed - 1:
            self.reached.set()
            await self.go_on.wait()

    def waiting_for(
        self, wait: Callable[..., Coroutine[Any, Any, Any]], kind_of: Callable[..., str | None]
    ) -> Callable[..., Coroutine[Any, Any, Any]]:
        """Return a function that is a place before and behind what it waits for, if ``kind_of`` says that it is one."""

        async def waited(*arguments: Any, **named: Any) -> Any:
            kind = kind_of(*arguments)
            if kind is None:
                return await wait(*arguments, **named)
            is_place = kind == "place"
            if is_place:
                await self.place()
            self.inside += 1
            try:
                return await wait(*arguments, **named)
            finally:
                self.inside -= 1
                if is_place:
                    await self.place()

        return waited

    async def quiet(self, task: "asyncio.Future[Any]") -> None:
        """Return once it is done, or waits for what is held."""
        still = 0
        while not task.done() and still < QUIET:
            still = 0 if self.inside else still + 1
            await asyncio.sleep(0.0005 if self.inside else 0)


def in_thread(function: Callable[..., object], *_: object) -> str | None:
    """What work in a thread is: a place where a change may be held, what only looks, or none of it."""
    if not str(getattr(function, "__module__", "")).startswith(PLACES):
        return None
    return "look" if any(word in getattr(function, "__qualname__", "") for word in READING) else "place"


@pytest.fixture(scope="module")
def turnstile() -> Iterator[Turnstile]:
    turnstile = Turnstile()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "to_thread", turnstile.waiting_for(asyncio.to_thread, in_thread))
        for method in ENGINE:
            wait = turnstile.waiting_for(getattr(AsyncEngine, method), lambda *_: "place")
            patch.setattr(AsyncEngine, method, wait)
        yield turnstile


@pytest.fixture(scope="module")
def own(files: Files, tmp_path_factory: pytest.TempPathFactory, turnstile: Turnstile) -> Iterator[Running]:
    data = tmp_path_factory.mktemp("two")
    with running(files, data, keep_versions=2) as server:
        yield server
    [home] = (path.parent for path in data.glob("*/registry.db"))
    assert check(home).findings == ()


Ask = Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]


def asking(method: str, path: str, body: object = None) -> Ask:
    return lambda client: client.request(method, path, json=body)


def put(source: str) -> Ask:
    return asking("PUT", f"/adapters/{NAME}", {"src": source})


def post(source: str) -> Ask:
    return asking("POST", "/adapters", {"name": NAME, "src": source})


def canary(source: str) -> Ask:
    return asking("POST", f"/adapters/{NAME}/canary", {"src": source, "share": 0.5})


DELETE = asking("DELETE", f"/adapters/{NAME}")
UNLOAD = asking("POST", "/v1/unload_lora_adapter", {"lora_name": NAME})
BACK = asking("POST", f"/adapters/{NAME}/rollback")
PROMOTE = asking("POST", f"/adapters/{NAME}/canary/promote")
END = asking("DELETE", f"/adapters/{NAME}/canary")
SAY = asking("PATCH", f"/adapters/{NAME}", {"description": "sea shanties"})
SAY_MORE = asking("PATCH", f"/adapters/{NAME}", {"threshold": 0.5})
POST_AND_SAY = asking("POST", "/adapters", {"name": NAME, "src": "a", "description": "sea shanties"})
MIX = asking(
    "POST", "/adapters", {"name": MIXTURE, "mixture": [{"adapter": NAME}, {"adapter": OTHER, "weight": 0.5}]}
)
CANCELLED = "registration_cancelled"


@dataclass(frozen=True)
class Pair:
    """Two changes, what there is before them, and whether the second may cancel the first on its way in."""

    one: Ask
    two: Ask
    before: tuple[Ask, ...] = ()
    cancels: bool = False


PAIRS = {
    "two replacements": Pair(put("b"), put("c"), (post("a"),)),
    "replacement, deletion": Pair(put("b"), DELETE, (post("a"),), cancels=True),
    "replacement, way back": Pair(put("c"), BACK, (post("a"), put("b"))),
    "canary, promotion": Pair(canary("c"), PROMOTE, (post("a"), canary("b"))),
    "canary, its end": Pair(canary("b"), END, (post("a"),), cancels=True),
    "two registrations": Pair(post("a"), post("b")),
    "one registration, twice": Pair(post("a"), post("a")),
    "registration, deletion": Pair(post("a"), DELETE, cancels=True),
    "words, deletion": Pair(SAY, DELETE, (post("a"),)),
    "words, other words": Pair(SAY, SAY_MORE, (post("a"),)),
    "registration with words, unloading": Pair(POST_AND_SAY, UNLOAD),
    "mixture, deletion of its part": Pair(MIX, DELETE, (post("a"),)),
}
Outcome = tuple[object, object, object]


@dataclass
class Table:
    """A server of which two things are asked at once."""

    own: Running
    turnstile: Turnstile
    client: httpx.AsyncClient
    texts: dict[str, str] = field(default_factory=dict)
    """What adapters answer, by digest."""

    async def ask(self, who: str, change: Ask) -> tuple[int, str | None]:
        """Make a change; return status and code of the answer."""
        WHO.set(who)
        response = await change(self.client)
        code: str | None = response.json()["error"]["code"] if response.is_error else None
        return response.status_code, code

    async def one_after_the_other(self, first: tuple[str, Ask], then: tuple[str, Ask]) -> Outcome:
        """Return what comes of two changes that don't meet."""
        answers = {who: await asyncio.create_task(self.ask(who, change)) for who, change in (first, then)}
        return answers["one"], answers["two"], await self.state()

    async def meeting(self, held: tuple[str, Ask], other: tuple[str, Ask], at: int) -> tuple[Outcome, bool]:
        """Return what comes of two of which one is held at a place until the other is done, or waits for it.

        And whether it got there.
        """
        self.turnstile.hold(held[0], at)
        first = asyncio.create_task(self.ask(*held))
        reached = asyncio.create_task(self.turnstile.reached.wait())
        await asyncio.wait((first, reached), return_when=asyncio.FIRST_COMPLETED)
        got_there = reached.done()
        reached.cancel()
        then = asyncio.create_task(self.ask(*other))
        await self.turnstile.quiet(then)
        self.turnstile.go_on.set()
        answers = {held[0]: await first, other[0]: await then}
        return (answers["one"], answers["two"], await self.state()), got_there

    async def state(self) -> object:
        """Return what there is of the names, having held registry, files and engine against it."""
        self.turnstile.hold("", None)
        catalog = self.own.server.catalog
        await catalog.settled()
        await self._check_books()
        listed = await self.client.get(f"/adapters/{NAME}/versions")
        mixture = (await self.client.get(f"/adapters/{MIXTURE}")).json().get("state")
        if listed.status_code == 404:
            answer = await self.client.post("/v1/completions", json={"model": NAME, "prompt": "x"})
            assert answer.status_code == 404
            return None, mixture
        told = listed.json()
        assert all(each["state"] == "available" and each["registration"] is None for each in told["data"])
        await self._check_answer(told)
        words = (await self.client.get(f"/adapters/{NAME}")).json()["auto"]
        return [(each["role"], each["digest"], each["share"]) for each in told["data"]], mixture, words

    async def _check_answer(self, told: dict[str, Any]) -> None:
        """Hold what answers for each version against what its files answer."""
        for each in told["data"]:
            model = f"{NAME}@{each['version']}"
            body = {"model": model, "prompt": "hello", "max_tokens": 2, "temperature": 0}
            answer = await self.client.post("/v1/completions", json=body)
            assert answer.headers["x-manylora-adapter"] == model
            text = answer.json()["choices"][0]["text"]
            assert self.texts.setdefault(each["digest"], text) == text

    async def _check_books(self) -> None:
        catalog, engine = self.own.server.catalog, self.own.server.engine
        lineages = await asyncio.to_thread(catalog._registry.lineages)
        records = [record for lineage in lineages for record in lineage.records]
        known = {
            entry.record for adapter in catalog.list() for entry in catalog.versions(adapter.record.name)
        }
        assert set(records) == known, "the registry says otherwise"
        digests = {record.digest for record in records}
        assert catalog._store.digests() == digests == catalog._registry.digests_in_use(), "files are left"
        assert list((catalog._store._root / ".staging").iterdir()) == []
        assert sum(engine.snapshot().adapters.values()) == len(records), "the engine knows others"
        await engine.check_integrity()

    async def set_up(self, pair: Pair) -> None:
        """Have there be what is there before."""
        self.turnstile.hold("", None)
        for each in (*(asking("DELETE", f"/adapters/{name}") for name in (MIXTURE, NAME)), *pair.before):
            response = await each(self.client)
            assert response.is_success or response.status_code == 404, response.text
        if pair.before:
            found = (await self.client.get(f"/adapters/{NAME}")).json()
            assert not found["auto"]["description"], "it was said of an adapter that is gone"


@pytest.fixture(scope="module")
def table(own: Running, turnstile: Turnstile) -> Table:
    transport = httpx.ASGITransport(app=own.server.app, client=("127.0.0.1", 1))
    client = httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=SECONDS)
    table = Table(own, turnstile, client)
    own.start(asking("POST", "/adapters", {"name": OTHER, "src": "templated"})(client)).result(SECONDS)  # type: ignore[arg-type]  # it is one
    return table


async def all_meetings(table: Table, pair: Pair) -> int:
    """Let the two meet wherever they can, and hold each outcome against what may be; return how often that was."""
    one, two = ("one", pair.one), ("two", pair.two)
    may = []
    for first, then in ((one, two), (two, one)):
        await table.set_up(pair)
        may.append(await table.one_after_the_other(first, then))
    meetings = 0
    for held, other in ((one, two), (two, one)):
        for at in range(100):
            await table.set_up(pair)
            async with asyncio.timeout(SECONDS):
                outcome, got_there = await table.meeting(held, other, at)
            if not got_there:
                break
            meetings += 1
            cancelled = pair.cancels and outcome[0] == (409, CANCELLED) and outcome[1] == (200, None)
            # Whoever cancels finds what there was before, and does to it what it does alone.
            assert cancelled or outcome in may, f"held {held[0]} at place {at}: {outcome}, not one of {may}"
            if cancelled:
                await table.set_up(pair)
                await table.ask("", pair.two)
                left = await table.state()
                assert outcome[2] == left, f"{outcome[2]} is left, not {left}"
    return meetings


@pytest.mark.parametrize("name", PAIRS)
def test_two_changes_of_one_name_are_as_one_after_the_other(table: Table, name: str) -> None:
    meetings = table.own.start(all_meetings(table, PAIRS[name])).result(SECONDS * 4)
    assert isinstance(meetings, int)
    assert meetings >= 4, "they hardly meet"
