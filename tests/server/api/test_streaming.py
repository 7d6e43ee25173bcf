"""Streams on the wire: events, keep-alive, errors before and after the first byte, and clients that hang up."""

import json
import socket
from collections.abc import Iterator

import httpx
import pytest

from tests.server.api.running import BASE, Files, Running, asked, running

LONG = {"model": BASE, "prompt": "x", "max_tokens": 1000, "ignore_eos": True}
CHAT = {"model": "a", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "stream": True}


def events_of(text: str) -> list[str]:
    """Return the data of each event, having checked that nothing else is on the wire."""
    *blocks, rest = text.split("\n\n")
    assert rest == ""
    lines = [block for block in blocks if not block.startswith(":")]
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def aborted(server: Running) -> float:
    return server.metric("manylora_requests_total", adapter=BASE, outcome="aborted") or 0.0


def wait_until_aborted(server: Running, count: float) -> None:
    """Fail unless so many requests have been aborted: one is counted once all that it held is free."""
    server.wait_until("counted", lambda: aborted(server) >= count)
    assert aborted(server) == count


def generated(server: Running) -> float:
    return server.metric("manylora_tokens_total", adapter=BASE, kind="generated") or 0.0


def test_events_are_data_lines_that_end_with_done(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json=CHAT)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["x-request-id"]
    *chunks, last = events_of(answer.text)
    assert last == "[DONE]"
    parsed = [json.loads(chunk) for chunk in chunks]
    assert len({chunk["id"] for chunk in parsed}) == 1
    assert "usage" not in parsed[0]
    assert [chunk["choices"][0]["finish_reason"] for chunk in parsed] == [None] * (len(parsed) - 1) + [
        "length"
    ]


def test_an_error_before_the_first_byte_is_a_status(server: Running, http: httpx.Client) -> None:
    assert http.post("/v1/chat/completions", json={**CHAT, "model": "nobody"}).status_code == 404
    with server.failing(RuntimeError("x")):
        answer = http.post("/v1/chat/completions", json=CHAT)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "step_failed"


def test_an_error_after_the_first_byte_is_the_last_event(server: Running, http: httpx.Client) -> None:
    with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
        assert answer.status_code == 200
        parts = answer.iter_text()
        text = next(parts)
        with server.failing(RuntimeError("x")):
            text += "".join(parts)
    last = json.loads(events_of(text)[-1])
    assert last["error"]["code"] == "step_failed"
    assert last["request_id"] == answer.headers["x-request-id"]


@pytest.fixture(scope="module")
def impatient(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that says something every 50 ms."""
    with running(files, tmp_path_factory.mktemp("impatient"), keep_alive_seconds=0.05) as server:
        yield server


def test_a_silent_stream_is_kept_alive_before_its_first_token(impatient: Running) -> None:
    body = {**LONG, "max_tokens": 2, "stream": True}
    with (
        impatient.held() as go_on,
        httpx.stream("POST", f"{impatient.url}/v1/completions", json=body) as answer,
    ):
        assert answer.status_code == 200
        parts = answer.iter_text()
        assert [next(parts), next(parts)] == [": keep-alive\n\n"] * 2
        go_on.set()
        assert events_of("".join(parts))[-1] == "[DONE]"


def test_an_error_after_a_keep_alive_is_an_event(impatient: Running) -> None:
    body = {**LONG, "stream": True}
    with (
        impatient.held(RuntimeError("x")) as go_on,
        httpx.stream("POST", f"{impatient.url}/v1/completions", json=body) as answer,
    ):
        parts = answer.iter_text()
        assert next(parts).startswith(": keep-alive")
        go_on.set()
        assert json.loads(events_of("".join(parts))[-1])["error"]["code"] == "step_failed"


def test_hanging_up_after_a_keep_alive_frees_everything(impatient: Running) -> None:
    before = aborted(impatient)
    with impatient.held(), asked(impatient, {**LONG, "stream": True}) as connection:
        assert b"keep-alive" in connection.recv(1000) + connection.recv(1000)
    impatient.wait_until_idle()
    impatient.check_integrity()
    wait_until_aborted(impatient, before + 1)


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_frees_everything_at_once(server: Running, stream: bool, n: int) -> None:
    before, tokens = aborted(server), generated(server)
    with asked(server, {**LONG, "stream": stream, "n": n}) as connection:
        if stream:
            assert connection.recv(4000)
        server.wait_until_busy()
    server.wait_until_idle()
    wait_until_aborted(server, before + 1)
    assert generated(server) - tokens < 500 * n


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_before_the_first_token_frees_everything(server: Running, stream: bool) -> None:
    before, tokens = aborted(server), generated(server)
    with server.held(), asked(server, {**LONG, "stream": stream}):
        server.wait_until_busy()
    server.wait_until_idle()
    wait_until_aborted(server, before + 1)
    assert generated(server) - tokens < 500


def test_a_client_that_hangs_up_in_the_middle_of_its_body_is_no_fault(server: Running) -> None:
    with server.logged() as lines:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
        server.wait_until("logged", lambda: any(line.get("status") == 499 for line in lines))
    assert [line["log_level"] for line in lines] == ["info"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_every_chunk_before_the_usage_says_that_it_has_none(http: httpx.Client, path: str) -> None:
    body = {**CHAT, "stream_options": {"include_usage": True}}
    if "chat" not in path:
        body = {key: value for key, value in body.items() if key != "messages"} | {"prompt": "hello"}
    *chunks, last, done = events_of(http.post(path, json=body).text)
    assert done == "[DONE]"
    assert {json.loads(chunk).get("usage", "missing") for chunk in chunks} == {None}
    assert json.loads(last)["usage"]["prompt_tokens"] > 0
