"""Requests begin by and by while others' answers are being generated."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest
from starlette.types import Message, Receive, Scope, Send

from manylora.server.api import pacing
from manylora.server.api.pacing import (
    FEWEST,
    LOOK_SECONDS,
    PIECES_AT_A_TIME,
    REST,
    SECONDS_A_REQUEST,
    Paced,
    Rests,
)
from manylora.server.engine.pace import Tempo


class Desk:
    """An engine's tempo, and the requests that have begun."""

    def __init__(self, tempo: Tempo | None) -> None:
        self.tempo = tempo
        self.begun: list[str] = []
        self.app = Paced(self._serve, lambda: self.tempo)
        self.tasks: list[asyncio.Task[None]] = []

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.begun.append(scope["path"])

    def ask(self, count: int, path: str = "/v1/chat/completions") -> None:
        for number in range(count):
            scope = {"type": "http", "path": path, "number": number}
            self.tasks.append(asyncio.ensure_future(self.app(scope, _receive, _send)))

    async def passes(self, looks: int) -> int:
        """Let so much time pass and return how many have begun."""
        await asyncio.sleep(looks * LOOK_SECONDS)
        return len(self.begun)


async def _receive() -> Message:
    return {"type": "http.disconnect"}


async def _send(_: Message) -> None:
    return None


def run(story: Callable[[Desk], Awaitable[None]], tempo: Tempo | None) -> None:
    async def told() -> None:
        await story(Desk(tempo))

    asyncio.run(told())


def test_with_nothing_to_generate_all_begin_at_once() -> None:
    async def story(desk: Desk) -> None:
        desk.ask(200)
        await asyncio.sleep(0)
        assert len(desk.begun) == 200

    run(story, None)


def test_few_begin_in_each_step_and_in_their_order() -> None:
    async def story(desk: Desk) -> None:
        for number in range(3 * FEWEST):
            desk.ask(1, f"/{number}")
        for step in (1, 2, 3):
            assert await desk.passes(3) == step * FEWEST
            desk.tempo = Tempo(1 + step, 0.001)
        assert desk.begun == [f"/{number}" for number in range(3 * FEWEST)]

    run(story, Tempo(1, 0.001))


@pytest.mark.parametrize("seconds", [0.1, 0.5])
def test_a_long_step_lets_more_begin(seconds: float) -> None:
    async def story(desk: Desk) -> None:
        desk.ask(500)
        assert await desk.passes(3) == pytest.approx(seconds / SECONDS_A_REQUEST, abs=1)

    run(story, Tempo(1, seconds))


def test_all_begin_once_the_last_answer_has_ended() -> None:
    async def story(desk: Desk) -> None:
        desk.ask(50)
        assert await desk.passes(2) == FEWEST
        desk.tempo = None
        assert await desk.passes(3) == 50

    run(story, Tempo(1, 0.001))


def test_a_step_that_hangs_keeps_nobody_out() -> None:
    async def story(desk: Desk) -> None:
        desk.ask(2 * FEWEST)
        assert await desk.passes(10) == FEWEST
        assert await desk.passes(30) == 2 * FEWEST

    run(story, Tempo(1, 0.001))


def test_probes_never_wait() -> None:
    async def story(desk: Desk) -> None:
        desk.ask(20)
        desk.ask(1, "/health")
        await asyncio.sleep(0)
        assert "/health" in desk.begun

    run(story, Tempo(1, 0.001))


def test_who_leaves_takes_nobodys_turn() -> None:
    async def story(desk: Desk) -> None:
        desk.ask(3 * FEWEST)
        await asyncio.sleep(0)
        for task in desk.tasks[FEWEST : 2 * FEWEST]:
            task.cancel()
        desk.tempo = Tempo(2, 0.001)
        assert await desk.passes(3) == 2 * FEWEST
        assert all(task.done() for task in desk.tasks)

    run(story, Tempo(1, 0.001))


class Clock:
    """A thread's processor time, and how long it slept."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.worked = 0.0
        self.slept: list[float] = []
        self.sleep = self.slept.append
        monkeypatch.setattr(pacing, "time", self)

    def thread_time(self) -> float:
        return self.worked

    def pieces(self, count: int) -> Iterator[int]:
        """Pieces that take 0.1 ms each."""
        for number in range(count):
            self.worked += 0.0001
            yield number


def test_who_writes_much_rests_for_three_times_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    count = 100 * PIECES_AT_A_TIME
    assert [*Rests(lambda: True).between(clock.pieces(count))] == [*range(count)]
    assert sum(clock.slept) == pytest.approx(REST * clock.worked)
    assert max(clock.slept) < 0.05


def test_those_who_rest_in_turn_have_no_more_together(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    rests = Rests(lambda: True)
    others = [rests.between(iter([1, 2])) for _ in range(3)]
    for other in others:
        next(other)
    for _ in rests.between(clock.pieces(PIECES_AT_A_TIME)):
        pass
    assert clock.slept == [pytest.approx(4 * REST * clock.worked)]
    # One that was given up counts no more.
    for other in others:
        other.close()  # type: ignore[attr-defined]  # it is a generator
    worked = clock.worked
    for _ in rests.between(clock.pieces(PIECES_AT_A_TIME)):
        pass
    assert clock.slept[1:] == [pytest.approx(REST * (clock.worked - worked))]


def test_with_nothing_to_generate_nobody_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    for _ in Rests(lambda: False).between(clock.pieces(10 * PIECES_AT_A_TIME)):
        pass
    assert clock.slept == [0] * 10
