"""The engine behind an event loop: streams end, slow readers lose nothing, aborts and stops reach everyone."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest

from manylora.adapters.types import AdapterWeights
from manylora.server.engine.adapter_readers import AHEAD
from manylora.server.engine.async_engine import AsyncEngine
from manylora.server.engine.engine import Engine
from manylora.server.engine.output_stream import OutputStream
from manylora.server.engine.request import FinishReason, SequenceOutput
from manylora.server.engine.residency import Load
from manylora.server.errors import (
    AdapterUnavailable,
    ContextLengthExceeded,
    InvalidRequest,
    ModelNotFound,
    QueueFull,
    ServerError,
    ShuttingDown,
    StepFailed,
)
from tests.server.engine.fakes import (
    FakeArena,
    FakeModel,
    Letters,
    Pools,
    Recorder,
    ask,
    expected,
    make_engine,
    weights,
)

PROMPT = [3, 1, 4, 1, 5]
pytestmark = pytest.mark.timeout(60)


class Bench:
    """An AsyncEngine with the fakes behind it. ``hold`` keeps the model from computing."""

    def __init__(self, pools: Pools, max_waiting: int, context: int, audit_after: float = 0.0) -> None:
        self.arena = FakeArena(pools.rows)
        self.model = FakeModel(self.arena, (pools.blocks + 1) * pools.block_size, pools.block_size)
        self.gate = threading.Event()
        self.gate.set()
        self.reached = threading.Event()
        self.fault: Callable[[], Exception | None] = lambda: None
        self.model.fault = self._pass
        self.observer = Recorder()
        self.inner: list[Engine] = []

        def make(load: Load) -> Engine:
            self.inner.append(make_engine(pools, self.model, self.arena, Letters(), load, self.observer))
            return self.inner[0]

        self.engine = AsyncEngine(make, max_waiting, context, self.observer, audit_after)

    async def hold(self) -> None:
        """Let the thread run into a step and stay there."""
        self.gate.clear()
        self.reached.clear()
        self.engine.submit(ask("holds", [9], 200))
        await asyncio.to_thread(self.reached.wait)

    def _pass(self, tokens: list[int]) -> Exception | None:
        self.reached.set()
        self.gate.wait()
        return self.fault()


async def test_an_adapter_is_refused_from_the_moment_that_its_removal_is_asked_for() -> None:
    """Also while a step keeps the thread from hearing of it: the caller can look the name up again, a stream can't."""
    async with running() as bench:
        await know(bench, 1)
        await bench.hold()
        removing = asyncio.create_task(bench.engine.remove_adapter(1, abort=False))
        await asyncio.sleep(0)
        with pytest.raises(ModelNotFound):
            bench.engine.submit(ask("late", PROMPT, 3, ((1, 1.0),)))
        bench.gate.set()
        await removing


class Audits:
    """Watches the audits of a bench's pools."""

    def __init__(self, bench: Bench) -> None:
        self.count = 0
        self._happened = threading.Event()
        self._audit = bench.inner[0].audit
        bench.inner[0].audit = self._watched  # type: ignore[method-assign]

    def wait(self) -> None:
        """Return when there has been an audit since the last call."""
        self._happened.wait()
        self._happened.clear()

    def _watched(self) -> Iterator[None]:
        self.count += 1
        try:
            yield from self._audit()
        finally:
            self._happened.set()


@asynccontextmanager
async def running(
    pools: Pools | None = None, max_waiting: int = 1000, context: int = 220, audit_after: float = 0.0
) -> AsyncIterator[Bench]:
    bench = Bench(pools or Pools(), max_waiting, context, audit_after)
    bench.engine.start()
    try:
        yield bench
        await bench.engine.drain(30)
        await bench.engine.check_integrity()
    finally:
        bench.gate.set()
        await bench.engine.stop()


async def know(bench: Bench, adapter_id: int, rank: int = 4, *, preload: bool = False) -> None:
    held = weights(adapter_id, rank)
    await bench.engine.add_adapter(adapter_id, held, load_from=lambda: held, preload=preload, pinned=False)


async def read(stream: OutputStream) -> list[SequenceOutput]:
    return [output async for outputs in stream for output in outputs]


async def until(true: Callable[[], bool]) -> None:
    for _ in range(30_000):
        if true():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("never")


def tokens_of(outputs: list[SequenceOutput], index: int = 0) -> list[int]:
    return [token for output in outputs if output.index == index for token in output.token_ids]


async def test_streams_of_many_adapters_at_once() -> None:
    async with running() as bench:
        for adapter_id in range(1, 9):
            await know(bench, adapter_id)
        streams = {
            i: bench.engine.submit(ask(f"r{i}", PROMPT, 8, ((i, 1.0),) if i else (), n=2)) for i in range(9)
        }
        found = await asyncio.gather(*(read(stream) for stream in streams.values()))
        for i, outputs in enumerate(found):
            right = expected(PROMPT, 8, ((i, 1.0),) if i else ())
            assert [tokens_of(outputs, index) for index in range(2)] == [right, right]


async def test_a_slow_reader_gets_everything_in_few_pieces() -> None:
    async with running() as bench:
        stream = bench.engine.submit(ask("slow", PROMPT, 30))
        quick = bench.engine.submit(ask("quick", PROMPT, 40))
        await read(quick)
        pieces = [outputs async for outputs in stream]
        assert len(pieces) == 1
        assert tokens_of(pieces[0]) == expected(PROMPT, 30)


async def test_256_streams_a_third_aborted_leave_nothing_behind() -> None:
    async with running(Pools(blocks=200, max_running=32)) as bench:
        for adapter_id in range(1, 21):
            await know(bench, adapter_id)

        async def client(number: int) -> None:
            adapters = ((number % 21, 1.0),) if number % 21 else ()
            stream = bench.engine.submit(ask(f"r{number}", PROMPT, 12, adapters))
            outputs: list[SequenceOutput] = []
            async for some in stream:
                outputs += some
                if number % 3 == 0:
                    stream.abort()
            assert outputs[-1].finish_reason in (FinishReason.LENGTH, FinishReason.ABORTED)
            right = expected(PROMPT, 12, adapters)
            assert tokens_of(outputs) == right[: len(tokens_of(outputs))]
            assert number % 3 == 0 or tokens_of(outputs) == right

        await asyncio.gather(*(client(number) for number in range(256)))
        stats = bench.engine.snapshot()
        assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, 200)
        freed = await asyncio.gather(
            *(bench.engine.remove_adapter(adapter_id, abort=False) for adapter_id in range(1, 21))
        )
        stats = bench.engine.snapshot()
        assert stats.free_arena_rows == stats.arena_rows
        assert stats.adapters == {"device": 0, "host": 0, "disk": 0}
        assert sum(each.rows for each in freed) > 0
        assert len(bench.observer.ended) == 256


async def test_an_abort_ends_its_stream_and_may_be_repeated() -> None:
    async with running() as bench:
        await bench.hold()
        stream = bench.engine.submit(ask("r", PROMPT, 10))
        stream.abort()
        bench.engine.abort("r")
        bench.engine.abort("holds")
        bench.engine.abort("never was")
        bench.gate.set()
        outputs = await read(stream)
        stream.abort()
        assert [output.finish_reason for output in outputs] == [FinishReason.ABORTED]


async def test_a_full_queue_refuses_at_once() -> None:
    async with running(max_waiting=2) as bench:
        await bench.hold()
        for name in ("a", "b"):
            bench.engine.submit(ask(name, PROMPT))
        with pytest.raises(QueueFull) as refused:
            bench.engine.submit(ask("c", PROMPT))
        assert refused.value.retry_after is not None
        bench.gate.set()


async def test_prompts_of_one_client_count_as_one_that_waits() -> None:
    async with running(max_waiting=2) as bench:
        await bench.hold()
        parts = [[ask(f"{name}{i}", PROMPT, 2, origin=name) for i in range(5)] for name in ("a", "b", "c")]
        streams = [bench.engine.submit_together(parts[0]), bench.engine.submit_together(parts[1])]
        with pytest.raises(QueueFull):
            bench.engine.submit_together(parts[2])
        bench.gate.set()
        outputs = await asyncio.gather(*map(read, streams))
        assert {each[-1].finish_reason for each in outputs} == {FinishReason.LENGTH}
        assert bench.engine.snapshot().waiting == 0


async def test_prompts_are_queued_all_or_none() -> None:
    async with running() as bench:
        good, bad = ask("a", PROMPT, 2, origin="x"), ask("b", PROMPT, 300, origin="x")
        with pytest.raises(ContextLengthExceeded):
            bench.engine.submit_together([good, bad])
        outputs = await read(bench.engine.submit(good))
        assert sum(len(output.token_ids) for output in outputs) == 2


async def test_what_can_never_run_is_refused_at_once() -> None:
    async with running() as bench:
        for request, error in (
            (ask("r", PROMPT, 300), ContextLengthExceeded),
            (ask("r", []), InvalidRequest),
            (ask("r", PROMPT, adapters=((5, 1.0),)), ModelNotFound),
        ):
            with pytest.raises(error):
                bench.engine.submit(request)
        stream = bench.engine.submit(ask("r", PROMPT))
        with pytest.raises(InvalidRequest, match="in use"):
            bench.engine.submit(ask("r", PROMPT))
        await read(stream)


async def test_a_cold_adapter_is_read_off_the_engines_thread() -> None:
    async with running() as bench:
        held, threads = weights(1), []

        def load_from() -> AdapterWeights:
            threads.append(threading.current_thread().name)
            return held

        await bench.engine.add_adapter_cold(1, held.rank_by_module(), load_from=load_from, pinned=False)
        assert bench.engine.adapter_tier(1) == "disk"
        streams = [bench.engine.submit(ask(f"r{i}", PROMPT, 4, ((1, 1.0),))) for i in range(4)]
        found = await asyncio.gather(*(read(stream) for stream in streams))
        assert all(tokens_of(outputs) == expected(PROMPT, 4, ((1, 1.0),)) for outputs in found)
        assert bench.engine.adapter_tier(1) == "device"
        assert len(threads) == 1
        assert threads[0].startswith("adapter-reader")


async def test_waiting_for_rows_ends_by_itself_while_nothing_else_happens() -> None:
    async with running(Pools(rows=4, adapter_timeout=0.05)) as bench:
        held = weights(1)
        await bench.engine.add_adapter(1, held, load_from=lambda: held, preload=True, pinned=True)
        await know(bench, 2)
        with pytest.raises(AdapterUnavailable):
            await know(bench, 3, preload=True)
        outputs = await read(bench.engine.submit(ask("r", PROMPT, 4, ((2, 1.0),))))
        assert isinstance(outputs[-1].error, AdapterUnavailable)


async def test_adapters_come_and_go_under_traffic() -> None:
    async with running(Pools(rows=12, blocks=128)) as bench:

        async def life(adapter_id: int) -> None:
            await know(bench, adapter_id)
            asked = [ask(f"r{adapter_id}-{i}", PROMPT, 6, ((adapter_id, 1.0),), n=2) for i in range(3)]
            reading = [asyncio.create_task(read(bench.engine.submit(request))) for request in asked]
            await asyncio.sleep(0)
            freed = await bench.engine.remove_adapter(adapter_id, abort=False)
            assert freed.aborted == 0
            for outputs in await asyncio.gather(*reading):
                assert tokens_of(outputs, 1) == expected(PROMPT, 6, ((adapter_id, 1.0),))

        await asyncio.gather(*(life(adapter_id) for adapter_id in range(1, 31)))
        assert not bench.engine.snapshot().resident


async def test_failing_steps_make_it_unready_until_one_goes_well() -> None:
    async with running() as bench:
        bench.fault = lambda: RuntimeError("boom")
        for number in range(3):
            assert bench.engine.ready
            outputs = await read(bench.engine.submit(ask(f"r{number}", PROMPT)))
            assert isinstance(outputs[-1].error, StepFailed)
        assert not bench.engine.ready
        assert "steps failed" in bench.engine.unready_reason
        bench.fault = lambda: None
        await read(bench.engine.submit(ask("good", PROMPT)))
        assert bench.engine.ready


async def test_requests_that_all_fail_make_it_unready_until_the_base_answers_again() -> None:
    """Without another request: nobody sends any to a server that isn't ready."""
    async with running() as bench:
        bench.model.overflows = lambda token, mark: True
        for number in range(3):
            assert bench.engine.ready
            outputs = await read(bench.engine.submit(ask(f"r{number}", PROMPT)))
            assert isinstance(outputs[-1].error, StepFailed)
        await until(lambda: not bench.engine.ready)
        assert "requests failed" in bench.engine.unready_reason
        bench.model.overflows = lambda token, mark: False
        await until(lambda: bench.engine.ready)


async def test_books_that_do_not_balance_make_it_unready_and_tell_everyone() -> None:
    bench = Bench(Pools(), 100, 200, audit_after=0.2)
    audits = Audits(bench)
    bench.engine.start()
    stream = bench.engine.submit(ask("r", PROMPT, 3, n=2))
    bench.inner[0].blocks._refs[60] += 1  # no public door breaks the books
    outputs = await read(stream)
    assert [output.index for output in outputs if output.finish_reason] == [0, 1]
    await asyncio.to_thread(audits.wait)
    with pytest.raises(ServerError):
        await know(bench, 1)
    assert not bench.engine.ready
    assert "internal check" in bench.engine.unready_reason
    await bench.engine.stop()


async def test_an_audit_waits_for_a_pause_between_requests() -> None:
    async with running(audit_after=0.2) as bench:
        audits = Audits(bench)
        for number in range(20):
            await read(bench.engine.submit(ask(f"r{number}", PROMPT)))
        assert audits.count <= 2  # the machine itself may pause
        await asyncio.to_thread(audits.wait)


async def test_nobody_waits_for_an_audit_that_nobody_asked_for() -> None:
    async with running() as bench:
        audits = Audits(bench)
        await read(bench.engine.submit(ask("r", PROMPT)))
        await bench.engine.check_integrity()
        assert audits.count == 1
        assert bench.engine._patience() is None  # it sleeps until a command comes


async def test_draining_finishes_what_runs_and_refuses_what_comes() -> None:
    async with running() as bench:
        reading = asyncio.create_task(read(bench.engine.submit(ask("r", PROMPT, 20))))
        await bench.engine.drain(30)
        with pytest.raises(ShuttingDown):
            bench.engine.submit(ask("late", PROMPT))
        assert tokens_of(await reading) == expected(PROMPT, 20)


async def test_draining_aborts_what_takes_too_long_and_stopping_tells_it() -> None:
    bench = Bench(Pools(), 100, 220)
    bench.engine.start()
    await know(bench, 1)
    await bench.hold()
    reading = asyncio.create_task(read(bench.engine.submit(ask("r", PROMPT, 200, ((1, 1.0),)))))
    await asyncio.sleep(0)
    removing = asyncio.create_task(bench.engine.remove_adapter(1, abort=False))
    await bench.engine.drain(0)
    bench.gate.set()
    await bench.engine.stop()
    assert (await reading)[-1].finish_reason is FinishReason.ABORTED
    assert (await removing).aborted == 0
    with pytest.raises(ShuttingDown):
        await know(bench, 2)


async def test_stopping_at_once_tells_every_stream_and_every_caller() -> None:
    bench = Bench(Pools(), 100, 220)
    bench.engine.start()
    await know(bench, 1)
    await bench.hold()
    stream = bench.engine.submit(ask("r", PROMPT, 200, ((1, 1.0),), n=2))
    removing = asyncio.create_task(bench.engine.remove_adapter(1, abort=False))
    await asyncio.sleep(0)
    bench.gate.set()
    await bench.engine.stop()
    outputs = await read(stream)
    assert {output.index for output in outputs if output.finish_reason is FinishReason.FAILED} == {0, 1}
    with pytest.raises(ShuttingDown):
        await removing


async def test_an_adapter_is_read_from_when_a_request_is_on_its_way_and_once() -> None:
    async with running() as bench:
        held, reads = weights(1), threading.Semaphore(0)
        count = 0

        def load_from() -> AdapterWeights:
            nonlocal count
            count += 1
            reads.acquire()
            return held

        await bench.engine.add_adapter_cold(1, held.rank_by_module(), load_from=load_from, pinned=False)
        bench.engine.prefetch([1, 99])
        bench.engine.prefetch([1])
        stream = bench.engine.submit(ask("r", PROMPT, 4, ((1, 1.0),)))
        reads.release()
        assert tokens_of(await read(stream)) == expected(PROMPT, 4, ((1, 1.0),))
        bench.engine.prefetch([1])
        assert count == 1, "it is on the device already"


async def test_what_is_read_ahead_doesnt_hold_up_what_a_request_waits_for() -> None:
    """So many are begun, and no more."""
    async with running() as bench:
        gate, begun = threading.Event(), []
        for adapter_id in range(1, 41):
            held = weights(adapter_id)

            def load_from(held: AdapterWeights = held) -> AdapterWeights:
                begun.append(held)
                gate.wait()
                return held

            await bench.engine.add_adapter_cold(
                adapter_id, held.rank_by_module(), load_from=load_from, pinned=False
            )
        bench.engine.prefetch(range(1, 40))
        stream = bench.engine.submit(ask("r", PROMPT, 4, ((40, 1.0),)))
        gate.set()
        assert tokens_of(await read(stream)) == expected(PROMPT, 4, ((40, 1.0),))
        assert len(begun) <= AHEAD + 1


async def test_an_audit_is_done_in_parts_between_steps() -> None:
    """Streams go on meanwhile; with 20,000 blocks there are some twenty parts."""
    async with running(Pools(blocks=20_000)) as bench:
        reading = asyncio.create_task(read(bench.engine.submit(ask("r", PROMPT, 60))))
        await asyncio.sleep(0)
        steps = len(bench.observer.steps)
        await bench.engine.check_integrity()
        assert len(bench.observer.steps) - steps >= 18
        await reading
