"""Hostile connections: silent, slow, cut off, with giant heads, with methods and paths that nobody serves."""

import json
from random import Random

from manylora.loadtest.checks.bars.hostile.exchange import Exchange, head, request
from manylora.loadtest.checks.bars.hostile.kind import Plan, Scene

CHAT = "/v1/chat/completions"
BLOCK = b"a" * (1 << 16)
SILENT = 64
"""Connections of one silent client."""


def half_sent(rng: Random, scene: Scene) -> Plan:
    """A head that promises more body than comes; then silence or a hang-up."""
    body = json.dumps(
        {"model": scene.models[0], "messages": [{"role": "user", "content": "Tell me"}]}
    ).encode()
    start = head("POST", CHAT, len(body) + rng.choice((0, 1, 10_000_000)))
    part = body[: rng.randrange(len(body))]
    return ((Exchange((start, part), leave_after=1 << 16, linger=rng.uniform(0, 3)),),)


def dripped(rng: Random, scene: Scene) -> Plan:
    """A whole request, a few bytes at a time."""
    body = json.dumps({"model": scene.models[0], "prompt": "Tell me", "max_tokens": 4}).encode()
    raw = head("POST", "/v1/completions", len(body)) + body
    size = rng.choice((7, 40))
    return ((Exchange(tuple(raw[at : at + size] for at in range(0, len(raw), size)), pause=0.01),),)


def silent(rng: Random, scene: Scene) -> Plan:
    """Many connections that say nothing, or only the beginning of a head."""
    start = rng.choice((b"", b"P", b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\n"))
    return ((*(Exchange((start,), leave_after=1, linger=rng.uniform(1, 6)) for _ in range(SILENT)),),)


def giant_heads(rng: Random, scene: Scene) -> Plan:
    """Heads of up to 100 MiB: one header, many headers, a path. An early refusal may be lost with the connection."""
    blocks = rng.choice((1, 2, 16, 160, 1600))
    pieces = rng.choice(
        (
            (b"GET /v1/models HTTP/1.1\r\nhost: a\r\nx-a: ", *[BLOCK] * blocks, b"\r\n\r\n"),
            (b"GET /v1/models HTTP/1.1\r\nhost: a\r\n", *[b"x-a: a\r\n" * 8192] * blocks, b"\r\n"),
            (b"GET /", *[BLOCK] * blocks, b" HTTP/1.1\r\nhost: a\r\n\r\n"),
            (b"GET /v1/models HTTP/1.1\r\nhost: a\r\nauthorization: Bearer ", *[BLOCK] * blocks, b"\r\n\r\n"),
            (b"GET /health?", *[BLOCK] * blocks, b" HTTP/1.1\r\nhost: a\r\n\r\n"),
        )
    )
    return ((Exchange(pieces, leave_after=1 << 16, linger=10),),)


def wrong_requests(rng: Random, scene: Scene) -> Plan:
    """What is not HTTP, or HTTP that contradicts itself."""
    raw = rng.choice(
        (
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"GET\r\n\r\n",
            b"\r\n" * 1000,
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999999999999\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
            b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzzz\r\n",
            b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
            b"POST /v1/completions HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\n{}",
            b"GET /health HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
            b"GET /health HTTP/1.1\r\nhost: \xff\r\n\xff: a\r\n\r\n",
        )
    )
    return ((Exchange((raw,), leave_after=1 << 12, linger=2),),)


def pipelined(rng: Random, scene: Scene) -> Plan:
    """Many requests on one connection before the first is answered."""
    one = b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n"
    return ((Exchange((one * rng.choice((2, 200)),), leave_after=1 << 18, linger=2),),)


def odd_routes(rng: Random, scene: Scene) -> Plan:
    """Paths and methods that nobody serves, and all that somebody does."""
    path = rng.choice(
        (
            "/",
            "/health",
            "/ready",
            "/metrics",
            "/v1/models",
            "/v1/models/demo",
            "/v1/models/%00",
            "/v1/models/" + "a" * 5000,
            "/docs",
            "/redoc",
            "/openapi.json",
            "/adapters",
            "/adapters/",
            "/adapters/nobody",
            "/adapters/%ff",
            "/adapters/nobody/export",
            "/adapters/nobody/export/1",
            "/adapters/nobody/export/1/download",
            "/exports",
            "/v1/embeddings",
            "//v1//models",
            "/v1/../adapters",
            "/%2e%2e/etc/passwd",
            "/v1/completions",
            "/tokenize",
        )
    )
    method = rng.choice(("GET", "GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE", "BREW"))
    return ((request(method, path),),)


def odd_headers(rng: Random, scene: Scene) -> Plan:
    """Headers that doors look at: keys, origins, hosts, forwarders, types, ids."""
    header = rng.choice(
        (
            "authorization: Bearer ",
            "authorization: Bearer \xff",
            "authorization: Basic aaaa",
            "x-request-id: " + "a" * 200,
            "x-request-id: a\x01b",
            "origin: http://evil.example",
            "origin: null",
            "x-forwarded-for: 203.0.113.9",
            "x-forwarded-for: 127.0.0.1, 203.0.113.9",
            "forwarded: for=203.0.113.9",
            "content-encoding: gzip",
            "content-type: text/plain",
            "accept: application/xml",
            "range: bytes=0-1",
            "te: trailers",
        )
    )
    path = rng.choice(("/adapters", "/v1/models", "/health", "/exports"))
    return ((request("GET", path, headers=(header,)),),)
