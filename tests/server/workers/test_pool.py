"""Workers: every question ends, whatever happens to the process; nobody keeps all of them; none outlives its server."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from manylora.server.workers import pool as pools
from manylora.server.workers.pool import WorkerPool, WorkersBusy
from manylora.server.workers.process import WorkerDied, WorkerProcess, WorkerTimedOut

ROOT = Path(__file__).resolve().parents[3]
MODULE = "tests.server.workers.obedient"
SECONDS = 60.0
"""For what happens at once, unless it never does."""


@pytest.fixture(autouse=True)
def tests_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def make() -> Iterator[Callable[..., WorkerPool]]:
    made: list[WorkerPool] = []

    def pool(size: int = 1, seconds: float = 20.0) -> WorkerPool:
        made.append(WorkerPool(lambda: WorkerProcess(MODULE), size=size, seconds=seconds))
        return made[-1]

    yield pool
    for each in made:
        each.close()


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # One that nobody has waited for is dead all the same.
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_one_process_answers_many_questions_in_turn(make: Callable[..., WorkerPool]) -> None:
    pool = make()
    answers = [pool.submit(b"who", f"key {i % 3}") for i in range(20)]
    assert {answer.result(SECONDS) for answer in answers} == {str(pool.pids[0]).encode()}
    assert pool.submit(b"print among the answers", "key").result(SECONDS) == str(pool.pids[0]).encode()


@pytest.mark.parametrize("order", [b"burn 1000", b"freeze"])
def test_a_question_that_takes_too_long_ends_with_its_process(
    make: Callable[..., WorkerPool], order: bytes
) -> None:
    pool = make(seconds=0.3)
    first = int(pool.submit(b"who", "key").result(SECONDS))
    with pytest.raises(WorkerTimedOut):
        pool.submit(order, "key").result(SECONDS)
    assert not alive(first)
    assert int(pool.submit(b"who", "key").result(SECONDS)) != first


def test_a_process_that_is_stopped_is_no_hang(make: Callable[..., WorkerPool]) -> None:
    pool = make(seconds=0.3)
    first = int(pool.submit(b"who", "key").result(SECONDS))
    os.kill(first, signal.SIGSTOP)
    with pytest.raises(WorkerTimedOut):
        pool.submit(b"x" * (4 << 20), "key").result(SECONDS)
    assert not alive(first)


def test_memory_is_bounded_while_it_is_taken(make: Callable[..., WorkerPool]) -> None:
    pool = make()
    assert pool.submit(b"allocate 10000000000", "key").result(SECONDS) == b"no memory"
    assert pool.submit(b"allocate 1000", "key").result(SECONDS) == b"1000"


def test_a_process_killed_from_outside_is_replaced_and_its_question_asked_again(
    make: Callable[..., WorkerPool], tmp_path: Path
) -> None:
    pool = make()
    first = int(pool.submit(b"who", "key").result(SECONDS))
    os.kill(first, signal.SIGKILL)
    assert int(pool.submit(b"who", "key").result(SECONDS)) != first
    mark = tmp_path / "died"
    assert int(pool.submit(f"die_once {mark}".encode(), "key").result(SECONDS)) > 0
    assert mark.exists()


@pytest.mark.parametrize("order", [b"die", b"babble"])
def test_a_question_that_kills_every_process_fails(make: Callable[..., WorkerPool], order: bytes) -> None:
    pool = make()
    with pytest.raises(WorkerDied) as caught:
        pool.submit(order, "key").result(SECONDS)
    assert not isinstance(caught.value, WorkerTimedOut)
    assert int(pool.submit(b"who", "key").result(SECONDS)) > 0


def test_what_one_asks_for_does_not_keep_the_others_waiting(make: Callable[..., WorkerPool]) -> None:
    pool = make(size=2)
    burning = [pool.submit(b"burn 1000", "one") for _ in range(10)]
    others = [pool.submit(b"who", f"other {i}") for i in range(10)]
    assert all(other.result(SECONDS) for other in others)
    wait_until(lambda: len(pool.pids) == 2)  # the burning one's may still be on its way
    assert not any(each.done() for each in burning)
    assert len(pool.pids) == 2


def test_keys_take_turns(make: Callable[..., WorkerPool]) -> None:
    pool = make()
    order: list[str] = []

    def note(name: str) -> Callable[[Future[bytes]], None]:
        return lambda _: order.append(name)

    first = pool.submit(b"burn 0.5", "a")
    wait_until(first.running)
    answers = []
    for key in ("a", "a", "b"):
        answers.append(pool.submit(b"who", key))
        answers[-1].add_done_callback(note(key))
    for answer in (first, *answers):
        answer.result(SECONDS)
    assert order == ["a", "b", "a"]


def test_too_many_questions_of_one_key_are_refused(
    make: Callable[..., WorkerPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "MOST_WAITING", 2)
    pool = make()
    burning = pool.submit(b"burn 1000", "one")
    wait_until(burning.running)
    waiting = [pool.submit(b"who", "one") for _ in range(2)]
    with pytest.raises(WorkersBusy):
        pool.submit(b"who", "one").result(SECONDS)
    pool.close()
    for each in (burning, *waiting):
        with pytest.raises(WorkerDied):
            each.result(SECONDS)


def test_a_question_that_waited_too_long_is_told(
    make: Callable[..., WorkerPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pools, "PATIENCE_SECONDS", 0.05)
    pool = make(seconds=0.5)
    pool.submit(b"who", "one").exception(SECONDS)
    burning = pool.submit(b"burn 1000", "one")
    wait_until(burning.running)
    late = pool.submit(b"who", "one")
    assert isinstance(late.exception(SECONDS), WorkersBusy)


def test_a_question_nobody_waits_for_any_more_is_not_asked(
    make: Callable[..., WorkerPool], tmp_path: Path
) -> None:
    pool = make()
    burning = pool.submit(b"burn 0.5", "one")
    wait_until(burning.running)
    gone = pool.submit(f"die_once {tmp_path / 'mark'}".encode(), "one")
    assert gone.cancel()
    assert pool.submit(b"who", "one").result(SECONDS)
    assert not (tmp_path / "mark").exists()


def test_close_ends_processes_that_burn(make: Callable[..., WorkerPool]) -> None:
    pool = make(size=2, seconds=1000.0)
    burning = [pool.submit(b"burn 1000", key) for key in "ab"]
    wait_until(lambda: all(each.running() for each in burning) and len(pool.pids) == 2)
    pids = pool.pids
    pool.close()
    for each in burning:
        with pytest.raises(WorkerDied):
            each.result(SECONDS)
    wait_until(lambda: not any(alive(pid) for pid in pids))
    with pytest.raises(WorkerDied):
        pool.submit(b"who", "a").result(SECONDS)


SERVER = f"""
import sys, time
from manylora.server.workers.pool import WorkerPool
from manylora.server.workers.process import WorkerProcess
pool = WorkerPool(lambda: WorkerProcess({MODULE!r}), size=2, seconds=2.0)
print(pool.submit(b"who", "idle").result().decode(), flush=True)
burning = pool.submit(b"burn 1000", "a"), pool.submit(b"burn 1000", "b")
while len(pool.pids) < 2 or not all(each.running() for each in burning): time.sleep(0.01)
print(*pool.pids, flush=True)
time.sleep(1000)
"""


def test_workers_end_with_a_server_that_is_killed() -> None:
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert server.stdout is not None
    with server.stdout as said:
        idle = int(said.readline())
        pids = [int(word) for word in said.readline().split()]
    assert idle in pids
    server.kill()
    server.wait()
    wait_until(lambda: not any(alive(pid) for pid in pids))
