"""What arrives on a connection byte by byte: heads, bodies, silence; and too many connections. Raw sockets."""

import asyncio
import contextlib
import json
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.api.running import BASE, Files, Running, running

SECONDS = 30.0
HEAD_SECONDS, IDLE_SECONDS = 0.5, 0.6
CHAT = json.dumps({"model": BASE, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}).encode()
POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture(scope="module")
def strict(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that waits for nobody."""
    limits = {
        "head_timeout": HEAD_SECONDS,
        "body_timeout": 0.5,
        "send_timeout": 0.5,
        "idle_timeout": IDLE_SECONDS,
    }
    with running(files, tmp_path_factory.mktemp("strict"), **limits) as server:
        yield server


@contextlib.contextmanager
def connection(server: Running) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=SECONDS) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield client


def answer(client: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Read one answer: its status (0: the server hung up instead), headers and body."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        try:
            byte = client.recv(1)
        except ConnectionResetError:
            byte = b""
        if not byte:
            assert not head
            return 0, {}, b""
        head += byte
    lines = head.decode().rstrip().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:])
    body = b""
    while len(body) < int(headers["content-length"]):
        body += client.recv(int(headers["content-length"]) - len(body))
    return int(lines[0].split()[1]), headers, body


def send_until_answered(client: socket.socket, piece: bytes, most: int) -> int:
    """Send ``piece`` again and again until the server answers or hangs up; return how many bytes went out."""
    sent = 0
    while sent < most:
        readable, writable, _ = select.select([client], [client], [], SECONDS)
        if readable:
            break
        assert writable
        try:
            sent += client.send(piece)
        except (BrokenPipeError, ConnectionResetError):
            break
    return sent


def refused(client: socket.socket, status: int, code: str) -> None:
    found, headers, body = answer(client)
    assert (found, headers["connection"]) == (status, "close")
    told = json.loads(body)
    assert told["error"]["code"] == code
    assert told["request_id"] == headers["x-request-id"]
    assert client.recv(1) == b""


MIB = 1 << 20
ENDLESS = {
    "a header's value": (b"GET /health HTTP/1.1\r\nhost: x\r\nx: ", b"x" * 65536, 431, "head_too_large"),
    "a header's name": (b"GET /health HTTP/1.1\r\n", b"x" * 65536, 431, "head_too_large"),
    "headers": (b"GET /health HTTP/1.1\r\n", b"x: y\r\n" * 1000, 431, "head_too_large"),
    "the path": (b"GET /", b"x" * 65536, 414, "uri_too_long"),
    "the query": (b"GET /health?", b"x" * 65536, 414, "uri_too_long"),
    "the method": (b"", b"G" * 65536, 400, "invalid_http"),
    "chunk extensions": (
        POST + b"transfer-encoding: chunked\r\n\r\n5;",
        b"x" * 65536,
        400,
        "invalid_http",
    ),
    "trailers": (
        POST + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n",
        b"x: y\r\n" * 1000,
        400,
        "invalid_http",
    ),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_has_no_end_is_cut_off_early(server: Running, kind: str) -> None:
    """A hundred megabytes of it were read and kept, in quadratic time."""
    start, piece, status, code = ENDLESS[kind]
    with connection(server) as client:
        client.sendall(start)
        # Buffers on the way hold a few megabytes.
        assert send_until_answered(client, piece, 64 * MIB) < 32 * MIB
        refused(client, status, code)


def test_a_whole_head_over_the_limits_is_refused_and_one_below_is_not(server: Running) -> None:
    rest = len("GET /health HTTP/1.1\r\nhost: x\r\nx: \r\n\r\n")
    for header, status in ((65_536 - rest, 200), (65_537 - rest, 431), (70_000, 431), (80_000, 431)):
        with connection(server) as client:
            client.sendall(f"GET /health HTTP/1.1\r\nhost: x\r\nx: {'x' * header}\r\n\r\n".encode())
            assert answer(client)[0] == status
    for count, status in ((120, 200), (129, 431)):
        with connection(server) as client:
            lines = "".join(f"x{i}: y\r\n" for i in range(count))
            client.sendall(f"GET /health HTTP/1.1\r\nhost: x\r\n{lines}\r\n".encode())
            assert answer(client)[0] == status


def test_a_path_too_long_is_414_whole_or_not(server: Running, files: Files, tmp_path: Path) -> None:
    """The parser can't take one of 64 KiB apart: it was told of as no HTTP."""

    def told(server: Running, target: str) -> tuple[int, str]:
        with connection(server) as client:
            client.sendall(f"GET {target} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            status, _, body = answer(client)
            return status, json.loads(body).get("error", {}).get("message", "")

    assert told(server, f"/health?{'a' * 65_000}")[0] == 200
    assert told(server, f"/{'a' * 66_000}") == (414, "the path and its query are over 65535 bytes")
    most = "the request's head is over 65536 bytes, most of it the path and its query"
    assert told(server, f"/{'a' * 65_530}") == (414, most)
    with running(files, tmp_path, max_head_kib=128) as wide:
        assert told(wide, f"/health?{'a' * 65_500}")[0] == 200
        assert told(wide, f"/{'a' * 66_000}") == (414, "the path and its query are over 65535 bytes")


def test_a_head_may_come_in_single_bytes(server: Running) -> None:
    with connection(server) as client:
        for byte in HEALTH:
            client.send(bytes([byte]))
        assert answer(client)[0] == 200
        client.sendall(HEALTH)
        assert answer(client)[0] == 200


@pytest.mark.parametrize(
    "broken",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / SPDY/9\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost x\r\n\r\n",
        POST + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n{}",
        POST + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        POST + b"content-length: -1\r\n\r\n",
        POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        b"CONNECT x:1 HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_no_http_is_400_in_the_envelope(server: Running, broken: bytes) -> None:
    with connection(server) as client:
        client.sendall(broken)
        refused(client, 400, "invalid_http")


def test_trailers_are_nobodys_headers(files: Files, tmp_path: Path) -> None:
    """A key in them opens nothing."""
    with running(files, tmp_path, api_key="k") as server, connection(server) as client:
        head = b"POST /tokenize HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ntrailer: authorization\r\n\r\n"
        client.sendall(head + b"0\r\nauthorization: Bearer k\r\n\r\n")
        assert answer(client)[0] == 401


def test_another_protocol_that_is_offered_is_not_taken(server: Running) -> None:
    """Java's client offers h2c with every request: the body is read all the same."""
    offer = b"connection: upgrade\r\nupgrade: h2c\r\n"
    with connection(server) as client:
        client.sendall(POST + offer + b"content-length: %d\r\n\r\n" % len(CHAT) + CHAT)
        assert answer(client)[0] == 200
    with connection(server) as client:
        client.sendall(
            b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"
        )
        assert answer(client)[0] == 200


def test_a_fault_in_a_request_costs_no_connection(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    """Its 500 is whole, so the next request may follow; uvicorn hung up, and told of the fault once more."""
    with server.broken_tokenizer(), server.logged() as lines, connection(server) as client:
        client.sendall(POST + b"content-length: %d\r\n\r\n" % len(CHAT) + CHAT)
        status, headers, body = answer(client)
        assert (status, json.loads(body)["error"]["code"]) == (500, "internal_error")
        assert "connection" not in headers
        client.sendall(HEALTH)
        assert answer(client)[0] == 200
    with server.logged():  # what was asked before is over
        assert [line["event"] for line in lines if line["log_level"] == "error"] == ["unexpected error"]
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


# Time


def test_silence_is_cut_off(strict: Running) -> None:
    with connection(strict) as client:
        assert client.recv(1) == b""


@pytest.mark.parametrize("start", [b"GET /", b"GET /health HTTP/1.1\r\nhost: x\r\n", b"\r\n\r\n\r\n"])
def test_a_head_that_never_ends_is_cut_off(strict: Running, start: bytes) -> None:
    """Bytes that keep coming don't help: the head's time is one."""
    with connection(strict) as client:
        client.sendall(start)
        piece = start[-1:] if start.isspace() else b"x"
        while not select.select([client], [], [], 0.05)[0]:
            client.send(piece)
        if start.isspace():
            assert answer(client)[0] == 0
        else:
            refused(client, 408, "request_timeout")


def test_the_next_head_has_its_time_too(strict: Running) -> None:
    with connection(strict) as client:
        client.sendall(HEALTH)
        assert answer(client)[0] == 200
        client.sendall(b"GET /health")
        refused(client, 408, "request_timeout")


def test_an_idle_connection_is_closed(strict: Running) -> None:
    with connection(strict) as client:
        client.sendall(HEALTH)
        assert answer(client)[0] == 200
        assert client.recv(1) == b""


@pytest.mark.parametrize("head", [b"content-length: 100\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n5\r\n"])
def test_a_body_that_never_ends_is_cut_off(strict: Running, head: bytes) -> None:
    with connection(strict) as client:
        client.sendall(POST + head)
        refused(client, 408, "request_timeout")


def test_a_body_that_was_answered_before_its_end_is_cut_off_too(strict: Running) -> None:
    with connection(strict) as client:
        client.sendall(b"POST /nothing HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n")
        assert answer(client)[0] == 404
        while client.recv(65536):  # a 408, or nothing
            pass


def test_a_request_may_take_longer_than_its_head(strict: Running) -> None:
    """Limits are of what the client owes: the engine's time is its own, and so is a pipelined request's wait."""
    with connection(strict) as client, strict.held() as go_on:
        client.sendall(POST + b"content-length: %d\r\n\r\n" % len(CHAT) + CHAT + b"GET /hea")
        strict.wait_until_busy()
        time.sleep(HEAD_SECONDS * 2)
        go_on.set()
        assert answer(client)[0] == 200
        client.sendall(b"lth HTTP/1.1\r\nhost: x\r\n\r\n")
        assert answer(client)[0] == 200


def test_a_client_that_reads_nothing_is_cut_off(strict: Running) -> None:
    body = {"model": BASE, "prompt": ["x" * 100] * 250, "max_tokens": 64, "logprobs": 20, "ignore_eos": True}
    content = json.dumps({**body, "stream": True}).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", strict.port))
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(content)
        )
        client.sendall(content)
        strict.wait_until_busy()
        strict.wait_until_idle()
        time.sleep(2 * 0.5)  # send_timeout, and as long again
        client.settimeout(SECONDS)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := client.recv(1 << 20):
                received += piece
    assert b"[DONE]" not in received
    strict.wait_until_idle()


# Number


def at_work(server: Running) -> int:
    """How many requests the application has and hasn't answered."""
    tasks = server.on_loop(asyncio.all_tasks)
    return sum("run_asgi" in repr(task.get_coro()) for task in tasks)


@pytest.fixture
def narrow(files: Files, tmp_path: Path) -> Iterator[Running]:
    with running(files, tmp_path, max_connections=8) as server:
        yield server


def test_silent_connections_keep_nobody_out(narrow: Running) -> None:
    """Beyond the limit who owes a head for the longest makes room."""
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connection(narrow)) for _ in range(100)]
        with connection(narrow) as client:
            client.sendall(POST + b"content-length: %d\r\n\r\n" % len(CHAT) + CHAT)
            assert answer(client)[0] == 200
        assert answer(silent[0])[0] == 0
        silent[-1].sendall(HEALTH)
        assert answer(silent[-1])[0] == 200


def test_when_all_are_at_work_probes_are_answered_and_others_told_to_come_again(narrow: Running) -> None:
    request = POST + b"content-length: %d\r\n\r\n" % len(CHAT) + CHAT
    with contextlib.ExitStack() as stack:
        go_on = stack.enter_context(narrow.held())
        busy = [stack.enter_context(connection(narrow)) for _ in range(8)]
        for client in busy:
            client.sendall(request)
        narrow.wait_until("all at work", lambda: at_work(narrow) == 8)
        with connection(narrow) as client:
            client.sendall(HEALTH)
            assert answer(client)[0] == 200
            client.sendall(request)
            status, headers, body = answer(client)
            assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
            assert json.loads(body)["error"]["code"] == "too_many_connections"
        for _ in range(100):  # silent, and more than the reserve
            stack.enter_context(connection(narrow))
        with connection(narrow) as client:
            client.sendall(HEALTH)
            assert answer(client)[0] == 200
        go_on.set()
        assert [answer(client)[0] for client in busy] == [200] * 8
