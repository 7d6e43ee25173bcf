"""The check of the step and the road back: what it counts, and which bars it finds missed."""

import asyncio

import pytest

from manylora.loadtest.checks.road import LEAST_SHARE, MANY, Gaps, Road, Steps, gaps_of, least_disturbed
from manylora.loadtest.checks.road_streams import Streams

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
EVENTS = b'data: {"a":1}\n\ndata: {"b":"data: x"}\n\ndata: [DONE]\n\n'


async def read(pieces: list[bytes]) -> tuple[int, bytes]:
    """Return how many events the client counts of an answer that comes in these pieces, and its status."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.001)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        run = Streams(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        stream = await run.ask("m", [1], 2)
        await run.until(lambda: stream.ended, 10)
        return len(stream.times), stream.status


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
async def test_events_are_counted_however_they_are_cut(size: int) -> None:
    pieces = [HEAD, *(EVENTS[at : at + size] for at in range(0, len(EVENTS), size))]
    assert await read(pieces) == (2, b"200")


async def test_a_stream_that_is_refused_ends_the_run() -> None:
    with pytest.raises(RuntimeError, match="refused"):
        await read([b"HTTP/1.1 429 Too Many Requests\r\n\r\n", b"x"])


def test_gaps_are_those_that_the_prompt_was_on_its_way_in() -> None:
    streams = [[0.0, 1.0, 2.0, 4.5, 5.5], [0.2, 1.2, 2.2, 3.7, 9.0]]
    found = gaps_of(streams, asked=2.2, come=3.0)
    assert found.median == pytest.approx(1.0)
    assert found.longest == pytest.approx(2.5)  # not the one that began after it had come
    assert found.seconds == pytest.approx(0.8)
    assert found.usual == pytest.approx(1.0)


def test_of_each_number_of_streams_the_round_counts_that_was_disturbed_least() -> None:
    rounds = [
        [Steps(1, 0.02, 0.01), Steps(MANY, 0.06, 0.05)],
        [Steps(1, 0.01, 0.009), Steps(MANY, 0.07, 0.05)],
    ]
    assert least_disturbed(rounds) == (rounds[1][0], rounds[0][1])


def test_what_misses_a_bar_is_said() -> None:
    fine = Steps(MANY, 0.0505, 0.05)
    sound = Road((Steps(MANY, 0.05, 0.0495),), (fine,), Gaps(0.03, 0.05, 0.059, 5.0))
    assert not sound.misses()
    slow = Road(sound.alone, (Steps(MANY, 0.05 / LEAST_SHARE + 0.002, 0.05),), Gaps(0.03, 0.05, 0.061, 5.0))
    first, second, third = slow.misses()
    assert "no kernel" in first
    assert "out of HTTP" in second
    assert "2.03 medians" in third
    # Python takes the time of one stream too, but the bar is told of many.
    assert not Road((Steps(1, 0.05, 0.04),), (Steps(1, 0.05, 0.04),), sound.gaps).misses()
    assert "2.03 medians" in slow.table()
