"""Bodies that are too large, broken, or made to keep the server busy; and that its event loop stays free."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from tests.server.api.running import Running

MIB = 1 << 20
HEAD = b'{"model": "a", "prompt": '
LONGEST_LAG = 5.0
"""In readings of a body by Python's own json, timed in the same moment: a slow or crowded machine slows both."""
TRIES = 6
"""A crowded machine makes a lag longer, never shorter: the shortest of so many is the server's own."""


def post(http: httpx.Client, content: bytes, path: str = "/v1/completions") -> httpx.Response:
    return http.post(path, content=content, headers={"content-type": "application/json"})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"model": "a",}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"model": "a", "prompt": "x", "temperature": NaN}', "expected value at line 1 column 46"),
        (b'{"model": "a", "prompt": "x", "temperature": -Infinity}', "invalid number"),
        (b'{"model": "a", "prompt": "x", "seed": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"model": "a", "prompt": "\xff"}', "invalid unicode code point"),
        ('{"model": "a", "prompt": "x"}'.encode("utf-16"), "not JSON in UTF-8"),
        (b'{"model": "a", "prompt": "\\ud800"}', "unexpected end of hex escape"),
        (b'{"model": "a", "prompt": "x", "\\udc00": 1}', "lone leading surrogate"),
        (b"[1]", "JSON object"),
        (b"null", "JSON object"),
        (b"{" + b",".join(b'"f%d": 1' % i for i in range(101)) + b"}", "101 fields"),
    ],
    ids=lambda case: str(case)[:40],
)
def test_broken_bodies_are_400(http: httpx.Client, content: bytes, words: str) -> None:
    answer = post(http, content)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_characters_beyond_the_first_plane_pass(http: httpx.Client) -> None:
    whole = json.dumps({"model": "a", "prompt": "🦙", "max_tokens": 1, "temperature": 0}).encode()
    assert b"\\ud" in whole
    assert post(http, whole).status_code == 200


def test_a_body_over_the_limit_is_413(http: httpx.Client) -> None:
    content = HEAD + b'"' + b"x" * (12 * MIB) + b'"}'

    def in_chunks() -> Iterator[bytes]:
        for start in range(0, len(content), MIB):
            yield content[start : start + MIB]

    for body in (content, in_chunks()):
        answer = http.post("/v1/completions", content=body)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
        assert str(12 * MIB) in answer.json()["error"]["message"]


def completion(prompt: bytes) -> bytes:
    return HEAD + prompt + b"}"


LARGE: dict[str, tuple[Callable[[], bytes], int]] = {
    "text": (lambda: completion(b'"' + b"abc defg" * (10 * MIB // 8) + b'"'), 400),
    "escapes": (lambda: completion(b'"' + b"\\n" * (5 * MIB) + b'"'), 400),
    "escaped characters": (lambda: completion(b'"' + b"\\u65e5" * (10 * MIB // 6) + b'"'), 400),
    "pairs": (lambda: completion(b'"' + b"\\ud83e\\udd99" * (10 * MIB // 12) + b'"'), 400),
    "token ids": (lambda: completion(b"[" + b"1," * 400_000 + b"1]"), 400),
    "more token ids": (lambda: completion(b"[" + b"1," * (5 * MIB) + b"1]"), 413),
    "empty lists": (lambda: completion(b"[" + b"[]," * 95_000 + b"[]]"), 400),
    "wrong ids": (lambda: HEAD + b'"x", "stop_token_ids": [' + b'"a",' * 400_000 + b'"a"]}', 400),
    "unknown fields": (lambda: b"{" + b",".join(b'"a%d":1' % i for i in range(95_000)) + b"}", 400),
    "biases": (
        lambda: HEAD + b'"x", "logit_bias": {' + b",".join(b'"%d":1' % i for i in range(95_000)) + b"}}",
        400,
    ),
}


class Heartbeat:
    """A task on the server's loop that asks to be woken every 2 ms, and how late that was at worst.

    Counted only as far as this process was computing meanwhile: what other processes take is not the server's.
    """

    def __init__(self) -> None:
        self.worst = 0.0

    async def beat(self) -> None:
        while True:
            asked, computed = time.perf_counter(), time.process_time()
            await asyncio.sleep(0.002)
            late = time.perf_counter() - asked - 0.002
            self.worst = max(self.worst, min(late, time.process_time() - computed))


def reading() -> float:
    """Return the seconds that Python's json takes for ten megabytes of escaped characters, on this thread alone."""
    content = LARGE["escaped characters"][0]()
    began = time.thread_time()
    json.loads(content)
    return time.thread_time() - began


def worst_lag(server: Running, during: Callable[[], None]) -> float:
    """Return for how many readings the server's event loop was held at worst by ``during``; the best of some tries."""
    worst = []
    for _ in range(TRIES):
        heart = Heartbeat()
        beating = server.start(heart.beat())
        during()
        beating.cancel()
        worst.append(heart.worst / reading())
        if worst[-1] < LONGEST_LAG:
            break
    return min(worst)


@pytest.mark.parametrize("kind", LARGE)
def test_a_large_body_does_not_hold_the_event_loop(server: Running, http: httpx.Client, kind: str) -> None:
    make, status = LARGE[kind]
    content = make()

    def ask() -> None:
        answer = post(http, content)
        assert answer.status_code == status, answer.text[:200]

    assert worst_lag(server, ask) < LONGEST_LAG


def test_a_large_chat_does_not_hold_the_event_loop(server: Running, http: httpx.Client) -> None:
    """A megabyte that is tokenised in full, since the length alone doesn't say that it can't fit."""
    for messages in (
        [{"role": "user", "content": "日本語 " * 2000}],
        [{"role": "user", "content": "hello world"}] * 20_000,
    ):
        content = json.dumps({"model": "a", "messages": messages}).encode()

        def ask(content: bytes = content) -> None:
            answer = post(http, content, "/v1/chat/completions")
            assert answer.json()["error"]["code"] == "context_length_exceeded"

        assert worst_lag(server, ask) < LONGEST_LAG


def test_tokenising_does_not_hold_the_event_loop(server: Running, http: httpx.Client) -> None:
    content = json.dumps({"prompt": "hello world 日本 " * 7_000, "return_token_strs": True}).encode()

    def ask() -> None:
        answer = post(http, content, "/tokenize")
        assert answer.json()["count"] > 70_000

    assert worst_lag(server, ask) < LONGEST_LAG


def test_large_answers_do_not_hold_the_event_loop(server: Running, http: httpx.Client) -> None:
    """Log probabilities of 20 alternatives for every token of 32 prompts and answers."""
    body = {
        "model": "a",
        "prompt": [[5 + index] * 200 for index in range(32)],
        "max_tokens": 2,
        "echo": True,
        "logprobs": 20,
    }
    content = json.dumps(body).encode()

    def ask() -> None:
        assert len(post(http, content).content) > MIB

    assert worst_lag(server, ask) < LONGEST_LAG
