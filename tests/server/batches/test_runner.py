"""Batches under way, with whatever answers their lines: what is answered is kept, whatever goes wrong beside it."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from manylora.server.batches import runner
from manylora.server.batches.database import BatchDatabase
from manylora.server.batches.ending import AT_ONCE, finish, give_up_rest
from manylora.server.batches.files import FileStore
from manylora.server.batches.lines import Answered, Checked, check
from manylora.server.batches.records import Batch, StoredFile, Usage
from manylora.server.batches.runner import Answer, Batches
from manylora.server.errors import InvalidRequest, QueueFull

ENDPOINT = "/v1/completions"
GOOD = Answered(200, "req", b'{"usage": {"prompt_tokens": 2, "completion_tokens": 1}}')
SECONDS = 60
"""After which something never happens."""


def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path, largest=1 << 30, most=1 << 30)


def kept(files: FileStore, content: bytes, owner: str = "me") -> StoredFile:
    incoming = files.new(owner)
    incoming.write(content)
    return files.add(incoming, owner, "in.jsonl", "batch")


def lines(count: int) -> bytes:
    each = ({"custom_id": str(n), "method": "POST", "url": ENDPOINT, "body": {"n": n}} for n in range(count))
    return "".join(json.dumps(line) + "\n" for line in each).encode()


@asynccontextmanager
async def under_way(files: FileStore, answer: Answer) -> AsyncIterator[Batches]:
    batches = Batches(files, in_flight=4, largest_line=1 << 20)
    await batches.open(answer)
    try:
        async with asyncio.timeout(SECONDS):
            yield batches
    finally:
        await batches.close()


async def begun(batches: Batches, count: int) -> Batch:
    file = await asyncio.to_thread(kept, batches.files, lines(count))
    return await batches.create("me", "key", ENDPOINT, file.id, {}, None)


async def over(batches: Batches, batch: Batch) -> Batch:
    work = batches._work.get(batch.id)
    if work is not None and work.task is not None:
        await asyncio.wait([work.task])
    return await batches.get(batch.id, "me")


def told(files: FileStore, file_id: str | None) -> list[dict[str, object]]:
    if file_id is None:
        return []
    return [json.loads(each) for each in files.path_of(files.get(file_id, "me")).read_text().splitlines()]


async def good(key: str, endpoint: str, body: bytes) -> Answered:
    return GOOD


async def broken(key: str, endpoint: str, body: bytes) -> Answered:
    if json.loads(body)["n"] == 1:
        raise RuntimeError("nobody foresaw it")
    return GOOD


async def cut_off(key: str, endpoint: str, body: bytes) -> Answered:
    return Answered(200, "req", GOOD.body[:9]) if json.loads(body)["n"] == 1 else GOOD


async def empty(key: str, endpoint: str, body: bytes) -> Answered:
    return Answered(500, "req", b"") if json.loads(body)["n"] == 1 else GOOD


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(100 * SECONDS):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never happens")


async def test_tenants_have_turns_at_lines_however_many_batches_each_has(tmp_path: Path) -> None:
    order, go_on = list[str](), asyncio.Event()

    async def answer(key: str, endpoint: str, body: bytes) -> Answered:
        order.append(key)
        await go_on.wait()
        return GOOD

    async with under_way(store(tmp_path), answer) as batches:
        for owner in ("acme", "acme", "acme", "globex"):
            file = await asyncio.to_thread(kept, batches.files, lines(20), owner)
            await batches.create(owner, owner, ENDPOINT, file.id, {}, None)
        # Each has four lines that it reads ahead.
        await until(lambda: sum(map(len, batches._turns._waiting.values())) == 12)
        already = order.count("globex")
        go_on.set()
        await asyncio.wait([work.task for work in batches._work.values() if work.task is not None])
        assert order[:12].count("globex") >= already + 3, "he has every other turn"


@pytest.mark.parametrize("answer", [broken, cut_off, empty])
async def test_a_fault_in_one_line_is_its_own_answer_and_the_others_stand(
    tmp_path: Path, answer: Answer
) -> None:
    async with under_way(store(tmp_path), answer) as batches:
        done = await over(batches, await begun(batches, 3))
        assert (done.status, done.counts.completed, done.counts.failed) == ("completed", 2, 1)
        assert [each["custom_id"] for each in told(batches.files, done.output_file_id)] == ["0", "2"]
        [fault] = told(batches.files, done.error_file_id)
        response = fault["response"]
        assert isinstance(response, dict)
        assert (fault["custom_id"], response["status_code"]) == ("1", 500)
        assert response["body"]["error"]["code"] == "internal_error"


async def test_a_batch_whose_input_is_lost_before_it_begins_is_failed(tmp_path: Path) -> None:
    files = store(tmp_path)
    never = Batch("batch_1", "me", "key", ENDPOINT, "file-1", 0, 1 << 40)
    files.database.add_batch(never)
    async with under_way(files, good) as batches:
        done = await over(batches, never)
        assert (done.status, [each.code for each in done.errors]) == ("failed", ["input_lost"])


async def test_a_batch_whose_input_is_lost_on_the_way_keeps_its_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = store(tmp_path)
    asked, counted, count = list[bytes](), asyncio.Event(), runner._count

    def tells(work: runner._Work, usage: Usage, *, good: bool) -> None:
        count(work, usage, good=good)
        counted.set()

    async def first_only(key: str, endpoint: str, body: bytes) -> Answered:
        asked.append(body)
        return GOOD if len(asked) == 1 else await asyncio.Event().wait() and GOOD

    monkeypatch.setattr(runner, "_count", tells)
    async with under_way(files, first_only) as batches:
        batch = await begun(batches, 2)
        await counted.wait()
    files.input_of(batch.id).unlink()
    async with under_way(store(tmp_path), good) as batches:
        done = await over(batches, batch)
        assert (done.status, [each.code for each in done.errors]) == ("failed", ["input_lost"])
        assert [each["custom_id"] for each in told(batches.files, done.output_file_id)] == ["0"]


async def test_a_batch_on_which_the_server_fails_keeps_its_answers_and_tells_of_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("nobody foresaw it")

    async with under_way(store(tmp_path), good) as batches:
        # After the answers are kept, before the batch would be completed.
        monkeypatch.setattr(runner, "_count", fail)
        done = await over(batches, await begun(batches, 3))
        assert (done.status, [each.code for each in done.errors]) == ("failed", ["internal_error"])
        answered = told(batches.files, done.output_file_id)
        rest = told(batches.files, done.error_file_id)
        assert answered
        assert sorted(str(each["custom_id"]) for each in [*answered, *rest]) == ["0", "1", "2"]


async def test_a_batch_that_is_over_stays_so_whatever_comes_late(tmp_path: Path) -> None:
    async with under_way(store(tmp_path), good) as batches:
        batch = await begun(batches, 2)
        done = await over(batches, batch)
        assert not batches.files.database.put_batch(batch)
        assert batches.files.database.batch(batch.id) == done
        assert not batches.files.database.unfinished()


async def test_a_batch_that_is_ending_is_not_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time is over, and its record is about to be the last one."""
    refused = list[str]()
    loop = asyncio.get_running_loop()

    async with under_way(store(tmp_path), good) as batches:

        def cancelled_meanwhile(files: FileStore, batch: Batch) -> Batch:
            try:
                asyncio.run_coroutine_threadsafe(batches.cancel(batch.id, "me"), loop).result(SECONDS)
            except InvalidRequest as error:
                refused.append(error.message)
            return finish(files, batch)

        monkeypatch.setattr(runner, "finish", cancelled_meanwhile)
        monkeypatch.setattr(runner, "DAY", -1)
        done = await over(batches, await begun(batches, 2))
        assert done.status == "expired"
        assert "cancelling" not in done.times
        assert len(refused) == 1


async def test_a_batch_whose_input_cannot_be_dropped_is_over_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    async with under_way(store(tmp_path), good) as batches:
        monkeypatch.setattr(batches.files, "drop_input", fail)
        done = await over(batches, await begun(batches, 2))
        assert done.status == "completed"
        assert len(told(batches.files, done.output_file_id)) == 2
        assert batches.files.database.batch(done.id) == done


async def test_a_file_deleted_just_before_its_batch_begins_is_a_wrong_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with under_way(store(tmp_path), good) as batches:
        files = batches.files
        take: Callable[[StoredFile, str], None] = files.take_input

        def deleted_meanwhile(file: StoredFile, batch_id: str) -> None:
            files.delete(file.id, "me")
            take(file, batch_id)

        monkeypatch.setattr(files, "take_input", deleted_meanwhile)
        with pytest.raises(InvalidRequest, match="No such File object"):
            await begun(batches, 1)
        assert not files.database.unfinished()


def test_a_record_written_after_the_last_brings_no_files(tmp_path: Path) -> None:
    database = BatchDatabase(tmp_path / "batches.db")
    batch = Batch("batch_1", "me", "key", ENDPOINT, "file-1", 0, 1, status="completed")
    database.add_batch(batch)
    late = StoredFile("file-2", "me", 0, 1, "x", "batch_output")
    assert not database.put_batch(batch, (late,))
    assert database.file("file-2") is None
    database.close()


async def test_batches_that_are_being_made_count_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "MOST_UNFINISHED", 1)
    begins, go_on = threading.Event(), threading.Event()

    async with under_way(store(tmp_path), good) as batches:
        take = batches.files.take_input

        def held(file: StoredFile, batch_id: str) -> None:
            if begins.is_set():
                raise AssertionError("a second one is made")
            begins.set()
            go_on.wait(SECONDS)
            take(file, batch_id)

        monkeypatch.setattr(batches.files, "take_input", held)
        first = asyncio.create_task(begun(batches, 1))
        try:
            await asyncio.to_thread(begins.wait, SECONDS)
            with pytest.raises(QueueFull):
                await begun(batches, 1)
        finally:
            go_on.set()
        assert (await over(batches, await first)).status == "completed"
        monkeypatch.undo()
        assert (await over(batches, await begun(batches, 1))).status == "completed"


async def test_who_hangs_up_while_a_batch_is_made_leaves_one_that_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begins, go_on = threading.Event(), threading.Event()
    async with under_way(store(tmp_path), good) as batches:
        take = batches.files.take_input

        def held(file: StoredFile, batch_id: str) -> None:
            begins.set()
            go_on.wait(SECONDS)
            take(file, batch_id)

        monkeypatch.setattr(batches.files, "take_input", held)
        making = asyncio.create_task(begun(batches, 1))
        await asyncio.to_thread(begins.wait, SECONDS)
        making.cancel()
        go_on.set()
        await asyncio.wait([making])
        [batch] = await batches.list("me", None, 2)
        assert (await over(batches, batch)).status == "completed"


async def test_long_inputs_of_batches_hold_up_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many are checked at once as there are threads for everything."""
    threads, go_on = 4, threading.Event()
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(threads))

    def held(path: Path, endpoint: str, largest: int) -> Checked:
        go_on.wait(SECONDS)
        return check(path, endpoint, largest)

    monkeypatch.setattr(runner, "check", held)
    async with under_way(store(tmp_path), good) as batches:
        try:
            made = [await begun(batches, 1) for _ in range(2 * threads)]
            assert not go_on.is_set()
        finally:
            go_on.set()
        assert {(await over(batches, each)).status for each in made} == {"completed"}


def test_the_rest_of_a_batch_is_told_many_lines_at_once(tmp_path: Path) -> None:
    database = BatchDatabase(tmp_path / "batches.db")
    batch = Batch("batch_1", "me", "key", ENDPOINT, "file-1", 0, 1)
    database.add_batch(batch)
    database.add_result(batch.id, 7, "answer", Usage(1, 2, 0), good=True)
    (tmp_path / "input").write_bytes(lines(2 * AT_ONCE))
    statements = list[str]()
    database._connection.set_trace_callback(statements.append)
    give_up_rest(database, batch, tmp_path / "input", 1000, ("batch_expired", "too late"))
    assert statements.count("BEGIN IMMEDIATE") <= 4
    assert database.answered(batch.id) == set(range(2 * AT_ONCE))
    assert database.totals(batch.id)[0].completed == 1
    assert list(database.results(batch.id, good=True)) == ["answer"]
    database.close()


def test_blank_lines_are_bounded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manylora.server.batches.lines.MOST_LINES", 3)
    path = tmp_path / "input"
    for blank, codes in ((3, []), (6, ["too_many_tasks"])):
        path.write_bytes(lines(1) + b" \n" * blank)
        assert [each.code for each in check(path, ENDPOINT, 1000).errors] == codes
