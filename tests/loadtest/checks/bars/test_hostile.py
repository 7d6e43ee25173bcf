"""The hostile bar: plans are what their seed says, exchanges end as told, verdicts count what is felt."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from manylora.loadtest.checks.bars.hostile.exchange import (
    HUNG,
    NO_ANSWER,
    REFUSED,
    Exchange,
    call,
    perform,
    request,
)
from manylora.loadtest.checks.bars.hostile.kinds import WEIGHTS, label, plans
from manylora.loadtest.checks.bars.hostile.material import HostileMaterial, lanes
from manylora.loadtest.checks.bars.hostile.streams import Lane, Stream, Watch, watch
from manylora.loadtest.checks.bars.hostile.verdict import (
    Done,
    Limits,
    Usage,
    report_health,
    report_outcomes,
    report_streams,
)
from manylora.loadtest.checks.bars.report import Report

MIB = 1 << 20
MODELS = ("demo", "sql")
SOURCES = ("config-a", "header-a", "huge-a", "pattern-a", "template-a")
REFUSAL = b'{"error":{"message":"no","type":"invalid_request_error","param":null,"code":null}}'


@asynccontextmanager
async def server(answer: bytes | None, *, reads: int = 1) -> AsyncIterator[tuple[int, list[bytes]]]:
    """Answer every connection so, once it has sent something; None: never. Yields the port and what was sent."""
    heard: list[bytes] = []
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(reads):
            heard.append(await reader.read(1 << 16))
        if answer is None:
            await gone.wait()
        else:
            writer.write(answer)
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield listening.sockets[0].getsockname()[1], heard
    finally:
        gone.set()
        listening.close()


def test_plans_are_what_the_seed_says() -> None:
    first, again, other = (list(plans(seed, 200, MODELS, SOURCES)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert {kind for kind, _ in first} == {label(kind) for kind in WEIGHTS}
    assert {kind for kind, _ in plans(1, 20, MODELS, SOURCES, ("hang ups",))} == {"hang ups"}
    exchanges = [exchange for _, plan in first for stage in plan for exchange in stage]
    assert exchanges
    assert all(exchange.pieces for exchange in exchanges)


def test_the_material_has_sources_of_every_kind(tmp_path: Path) -> None:
    material = HostileMaterial.make(tmp_path)
    for kind in ("config", "header", "huge", "pattern", "template"):
        assert material.kind(kind)
    vocabulary = json.loads((material.base / "config.json").read_text())["vocab_size"]
    added = json.loads((material.base / "tokenizer.json").read_text())["added_tokens"]
    assert max(token["id"] for token in added) == vocabulary
    assert len(lanes()) == 8


async def test_an_exchange_tells_status_code_and_size() -> None:
    refused = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n\r\n" + REFUSAL
    async with server(refused) as (port, heard):
        done = await perform(call("POST", "/tokenize", {"prompt": "a"}), "127.0.0.1", port, 5)
    assert (done.status, done.code, done.message) == (400, "invalid_request_error", "no")
    assert done.size == len(refused)
    assert done.ended >= done.began
    assert heard[0].startswith(b"POST /tokenize HTTP/1.1\r\n")


async def test_an_exchange_without_an_answer_hangs_unless_it_leaves() -> None:
    async with server(None) as (port, _):
        waited = await perform(request("GET", "/"), "127.0.0.1", port, 0.05)
        left = await perform(Exchange((b"P",), leave_after=1, linger=0.01), "127.0.0.1", port, 30)
    assert (waited.status, left.status) == (HUNG, NO_ANSWER)
    assert (await perform(request("GET", "/"), "127.0.0.1", port, 5)).status == REFUSED


async def test_an_exchange_leaves_after_so_many_bytes() -> None:
    async with server(b"HTTP/1.1 200 OK\r\n\r\n" + b"a" * 1000) as (port, _):
        left = await perform(Exchange((b"GET",), leave_after=20, linger=30), "127.0.0.1", port, 60)
    assert (left.status, left.size) == (200, 20)


async def test_an_early_answer_is_read_though_the_server_stops_listening() -> None:
    async with server(b"HTTP/1.1 431 Too Large\r\n\r\n") as (port, _):
        pieces = (b"GET / HTTP/1.1\r\nx: ", *[b"a" * 65536] * 200)
        done = await perform(Exchange(pieces, leave_after=1000, linger=10), "127.0.0.1", port, 30)
    assert done.status in (431, NO_ANSWER)  # a reset may overtake it


@pytest.mark.parametrize(
    ("status", "kind", "awaited", "code", "message", "fine"),
    [
        (200, "any", True, "", "", True),
        (404, "any", True, "model_not_found", "", True),
        (422, "any", True, "", "", False),
        (500, "any", True, "internal_error", "", False),
        (500, "huge adapters", True, "step_failed", "logits are not finite", True),
        (500, "any", True, "step_failed", "logits are not finite", False),
        (503, "any", True, "shutting_down", "", True),
        (503, "any", True, "", "", False),
        (NO_ANSWER, "any", True, "", "", False),
        (NO_ANSWER, "any", False, "", "", True),
        (HUNG, "any", False, "", "", False),
    ],
)
def test_what_an_exchange_may_end_with(
    status: int, kind: str, awaited: bool, code: str, message: str, fine: bool
) -> None:
    done = Done(kind, awaited, status, code, message, 0, 0.0, 1.0)
    assert done.documented is fine
    report = Report("outcomes")
    report_outcomes(report, [done])
    assert report.passed is fine


def stream(*times: float, tokens: str = "abc", end: bool = True) -> Stream:
    lines = [
        b"data: "
        + json.dumps({"choices": [{"logprobs": {"content": [{"token": token, "logprob": -1.0}]}}]}).encode()
        for token in tokens
    ]
    done = [b"data: [DONE]"] if end else []
    return Stream(0.0, 200, (*times, *([times[-1]] if end else [])), (*lines, *done))


def seen(*streams: Stream) -> Watch:
    return Watch(streams={("lane", 0): list(streams)}, health=[(0.0, 0.1, 200)])


ALONE = {("lane", 0): [("a", -1.0), ("b", -1.0), ("c", -1.0)]}


def judged(watched: Watch) -> list[bool]:
    report = Report("streams")
    report_streams(report, ALONE, watched, Limits())
    report_health(report, watched, Limits())
    return [check.passed for check in report.checks]


def test_streams_must_be_those_alone_and_whole() -> None:
    assert judged(seen(stream(1, 2, 3))) == [True, True, True]
    assert judged(seen(stream(1, 2, 3, tokens="abd")))[0] is False
    assert judged(seen(stream(1, 2, tokens="ab")))[0] is False
    assert judged(seen(stream(1, 2, 3, end=False)))[0] is False
    assert judged(Watch())[:2] == [False, False]


def test_a_gap_counts_less_the_time_that_the_client_itself_stood_still() -> None:
    late = seen(stream(1, 2, 3), stream(4, 5, 11))
    assert judged(late) == [True, False, True]
    late.lags.append((6.0, 8.0))
    assert judged(late) == [True, True, True]


def test_health_must_answer_in_time_and_with_200() -> None:
    slow, wrong = seen(stream(1, 2, 3)), seen(stream(1, 2, 3))
    slow.health.append((1.0, 1.6, 200))
    wrong.health.append((1.0, 1.1, 0))
    assert judged(slow)[2] is False
    assert judged(wrong)[2] is False


async def test_watching_notes_streams_that_fail() -> None:
    over = asyncio.Event()
    failed = b"HTTP/1.1 503 Service Unavailable\r\n\r\n" + REFUSAL + b"\n"
    async with server(failed) as (port, _):
        watching = asyncio.create_task(watch(f"http://127.0.0.1:{port}", (Lane("lane", (b"{}",)),), over))
        await asyncio.sleep(0.05)
        over.set()
        found = await watching
    streams = found.streams["lane", 0]
    assert streams[0].status == 503
    assert streams[0].tokens() == [("failed: no", 0.0)]
    assert found.health[0][2] == 503


@pytest.mark.parametrize(
    ("after", "fine"),
    [
        (Usage(390 * MIB, 20, 9, 0), True),
        (Usage(400 * MIB, 20, 9, 0), False),
        (Usage(510 * MIB, 20, 9, 2), True),
        (Usage(200 * MIB, 20, 9, 13), False),
        (Usage(200 * MIB, 29, 9, 0), False),
    ],
)
def test_memory_comes_back_but_for_the_processes_that_are_kept(after: Usage, fine: bool) -> None:
    assert Limits().came_back(Usage(200 * MIB, 20, 9, 0), after) is fine
