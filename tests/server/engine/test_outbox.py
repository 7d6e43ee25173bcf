"""How what a step brought reaches the event loop: in order, and when the engine's thread lets it."""

import asyncio

from manylora.server.engine.outbox import Outbox, Pieces, wake
from manylora.server.engine.request import SequenceOutput


def said(number: int) -> SequenceOutput:
    return SequenceOutput("r", 0, str(number), (number,))


class Bench:
    """An engine's pieces, and what the loop was fed."""

    def __init__(self) -> None:
        self.pieces: list[SequenceOutput] = []
        self.fed: list[str] = []
        self.changed = asyncio.Event()
        self.outbox = Outbox(self.take, self.feed)

    def take(self) -> Pieces:
        pieces, self.pieces = self.pieces, []
        return pieces

    def feed(self, pieces: Pieces) -> None:
        self.fed += [piece.text for piece in pieces if isinstance(piece, SequenceOutput)]
        self.changed.set()


async def until(bench: Bench, fed: list[str]) -> None:
    async with asyncio.timeout(10):
        while bench.fed != fed:
            bench.changed.clear()
            await bench.changed.wait()


async def test_nothing_is_handed_over_before_the_byte_and_all_of_it_in_order_after() -> None:
    bench = Bench()
    bench.outbox.open(asyncio.get_running_loop())
    assert bench.outbox.put() == -1
    for number in range(3):
        bench.pieces = [said(2 * number), said(2 * number + 1)]
        listener = bench.outbox.put()
    await asyncio.sleep(0.02)
    assert bench.fed == []
    wake(listener)
    await until(bench, ["0", "1", "2", "3", "4", "5"])
    assert bench.outbox.put() == -1
    bench.pieces = [said(6)]
    wake(bench.outbox.put())
    await until(bench, ["0", "1", "2", "3", "4", "5", "6"])
    bench.outbox.close()


async def test_a_loop_that_takes_nothing_for_long_stops_nobody() -> None:
    bench = Bench()
    bench.outbox.open(asyncio.get_running_loop())
    bench.pieces = [said(1)]
    listener = bench.outbox.put()
    for _ in range(100_000):  # more bytes than a pipe holds
        wake(listener)
    await until(bench, ["1"])
    bench.outbox.close()


async def test_nobody_listens_before_it_opens_and_after_it_closes() -> None:
    bench = Bench()
    bench.pieces = [said(1)]
    assert bench.outbox.put() == -1
    bench.outbox.open(asyncio.get_running_loop())
    bench.outbox.close()
    bench.pieces = [said(2)]
    assert bench.outbox.put() == -1
    bench.outbox.empty()
    assert bench.fed == ["1", "2"]
    wake(-1)
