"""Who may call what: keys, loopback, browsers."""

import http.client
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from manylora.server.api.documented import OPERATIONS
from tests.server.api.running import BASE, Files, Running, running

PAGE = "https://app.example"
CHAT = {"model": BASE, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
V1 = [
    ("GET", "/v1/models"),
    ("GET", f"/v1/models/{BASE}"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
]
ADMIN = [
    ("POST", "/adapters"),
    ("GET", "/adapters"),
    ("GET", "/adapters/a"),
    ("PUT", "/adapters/a"),
    ("DELETE", "/adapters/a"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
]
OPEN = ["/health", "/ready", "/metrics", "/docs", "/openapi.json"]


@pytest.fixture(scope="module")
def guarded(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(
        files, tmp_path_factory.mktemp("keys"), api_key="one,zwölf", admin_key="boss", cors_origin=PAGE
    ) as server:
        yield server


def status(server: Running, method: str, path: str, key: str | None, **headers: str) -> int:
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    sent = [(name.encode(), value.encode()) for name, value in headers.items()]
    return httpx.request(
        method, server.url + path, headers=sent, json={} if method == "POST" else None
    ).status_code


@pytest.mark.parametrize(("method", "path"), V1)
def test_v1_asks_for_a_key(guarded: Running, method: str, path: str) -> None:
    for key in (None, "two", "on", "onee", "ONE"):
        assert status(guarded, method, path, key) == 401
    for header in ("Basic one", "one", "Bearer"):
        assert status(guarded, method, path, None, authorization=header) == 401
    for key in ("one", "zwölf", "boss"):
        assert status(guarded, method, path, key) in (200, 400)
    assert status(guarded, method, path, None, authorization="bearer one") in (200, 400)  # RFC 9110, 11.1


@pytest.mark.parametrize(("method", "path"), ADMIN)
def test_what_changes_adapters_asks_for_the_admin_key(guarded: Running, method: str, path: str) -> None:
    for key in (None, "one", "bos"):
        assert status(guarded, method, path, key) == 401
    assert status(guarded, method, path, "boss") in (200, 400, 404)


@pytest.mark.parametrize(("method", "path"), sorted(OPERATIONS))
def test_no_route_is_forgotten(guarded: Running, method: str, path: str) -> None:
    """Whatever else is wrong with a request: who has no key hears of that alone."""
    door, asked = (
        OPERATIONS[method, path].door,
        re.sub(r"\{[a-z_]+\}", "x", path.replace("{job}", "export-0123456789abcdef")),
    )
    closed = (
        {None, "two"} if door == "api" else {None, "two", "one"} if door == "admin" else set[str | None]()
    )
    for key in closed:
        assert status(guarded, method.upper(), asked, key) == 401, key
    if door != "open":
        assert status(guarded, method.upper(), asked, "boss") != 401


@pytest.mark.parametrize("path", OPEN)
def test_probes_and_documentation_are_open(guarded: Running, path: str) -> None:
    assert status(guarded, "GET", path, None) == 200


def test_a_refusal_has_openais_shape_and_no_key_in_it(guarded: Running) -> None:
    answer = httpx.get(f"{guarded.url}/v1/models", headers={"authorization": "Bearer guess"})
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
    assert "guess" not in answer.text
    assert answer.headers["www-authenticate"] == "Bearer"


def test_without_keys_all_is_open_to_this_machine(server: Running) -> None:
    assert status(server, "GET", "/v1/models", None) == 200
    assert status(server, "GET", "/adapters", "anything") == 200


PROXIED = [
    ("x-forwarded-for", "192.0.2.7"),
    ("x-forwarded-for", "127.0.0.1"),
    ("X-Forwarded-For", "::1"),
    ("x-forwarded-host", "localhost"),
    ("x-forwarded-proto", "https"),
    ("forwarded", "for=127.0.0.1"),
    ("via", "1.1 proxy"),
    ("x-real-ip", "127.0.0.1"),
    ("wl-proxy-client-ip", "192.0.2.7"),
    ("x-original-host", "example.org"),
    ("tailscale-user-login", "somebody@example.org"),
    ("cf-connecting-ip", "127.0.0.1"),
    ("true-client-ip", "127.0.0.1"),
]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_what_came_through_a_proxy_is_not_from_this_machine(files: Files, tmp_path: Path, host: str) -> None:
    """Whatever the server listens on, and whomever the header names: anybody can write one."""
    with running(files, tmp_path, host=host) as server:
        for header, value in PROXIED:
            for method, path in [*ADMIN, ("GET", "/exports"), ("POST", "/adapters/a/export")]:
                assert status(server, method, path, None, **{header: value}) == 403, (header, method, path)
        answer = httpx.get(f"{server.url}/adapters", headers={"x-forwarded-for": "192.0.2.7"})
        message = answer.json()["error"]["message"]
        assert "--admin-key" in message
        assert "'x-forwarded-for'" in message
        assert status(server, "GET", "/adapters", None) == 200


def test_behind_a_proxy_the_admin_key_opens(guarded: Running) -> None:
    assert status(guarded, "GET", "/adapters", "boss", **{"x-forwarded-for": "192.0.2.7"}) == 200
    assert status(guarded, "GET", "/adapters", "boss", host="models.example") == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "127.0.0.1@evil.example",
        "evil.example#127.0.0.1",
        "192.0.2.7",
        "[2001:db8::1]",
        "[::1]evil.example",
        "",
    ],
)
def test_a_foreign_host_name_manages_no_adapters(server: Running, host: str) -> None:
    """A page whose own name resolves to this machine is, to its browser, the server's: it sends no origin."""
    for path in ("/adapters", "/exports", "/adapters/a"):
        answer = httpx.get(server.url + path, headers={"host": host})
        assert answer.status_code == 403
        assert "--allowed-host" in answer.json()["error"]["message"]


def test_two_host_names_manage_no_adapters(server: Running) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.putrequest("GET", "/adapters", skip_host=True)
    connection.putheader("host", "localhost")
    connection.putheader("host", "evil.example")
    connection.endheaders()
    assert connection.getresponse().status == 403
    connection.close()


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:80",
        "localhost.",
        "127.0.0.1:8000",
        "127.1.2.3",
        "[::1]:8000",
        "[::ffff:127.0.0.1]",
    ],
)
def test_names_of_this_machine_do(server: Running, host: str) -> None:
    assert status(server, "GET", "/adapters", None, host=host) == 200


def test_a_host_name_can_be_allowed(files: Files, tmp_path: Path) -> None:
    with running(files, tmp_path, allowed_host="Models.example,other") as server:
        assert status(server, "GET", "/adapters", None, host="models.example:8000") == 200
        assert status(server, "GET", "/adapters", None, host="other") == 200
        assert status(server, "GET", "/adapters", None, host="third") == 403


def test_what_other_sites_pages_embed_is_refused(server: Running) -> None:
    """An image's or a script's request has no origin."""
    assert status(server, "GET", "/adapters", None, **{"sec-fetch-site": "cross-site"}) == 403
    for site in ("same-origin", "same-site", "none"):
        assert status(server, "GET", "/adapters", None, **{"sec-fetch-site": site}) == 200
    named = {"sec-fetch-site": "cross-site", "origin": "http://localhost:3000"}
    assert status(server, "GET", "/adapters", None, **named) == 200


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "http://localhost.evil.example",
        "http://127.0.0.1@evil.example",
        "http://localhost\\@evil.example",
        "http://evil.example#@localhost",
        "http://[::1]@evil.example",
        "http://[2001:db8::1]",
        "file://localhost",
        "null",
        "http://[",
        "x",
        "",
    ],
)
def test_web_pages_manage_no_adapters(server: Running, origin: str) -> None:
    """A page can send simple requests to a server on its reader's machine; the browser says whose they are."""
    answer = httpx.post(
        f"{server.url}/adapters",
        content=b'{"name": "evil", "src": "b"}',
        headers={"origin": origin, "content-type": "text/plain"},
    )
    assert answer.status_code == 403
    assert "--cors-origin" in answer.json()["error"]["message"]


def test_two_origins_are_nobodys(server: Running) -> None:
    twice = [("origin", "http://localhost:3000"), ("origin", "https://evil.example")]
    assert httpx.get(f"{server.url}/adapters", headers=twice).status_code == 403
    assert httpx.get(f"{server.url}/adapters", headers=twice[:1]).status_code == 200


@pytest.mark.parametrize("origin", ["http://127.0.0.1:8000", "http://localhost:3000", "https://[::1]:8000"])
def test_pages_of_this_machine_do(server: Running, origin: str) -> None:
    """The server's own /docs is one."""
    assert status(server, "GET", "/adapters", None, origin=origin) == 200


def test_a_browser_may_ask_from_a_named_origin(guarded: Running) -> None:
    preflight = httpx.options(
        f"{guarded.url}/v1/chat/completions",
        headers={
            "origin": PAGE,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type,x-request-id",
        },
    )
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == PAGE
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    other = httpx.options(
        f"{guarded.url}/v1/chat/completions",
        headers={"origin": "https://evil.example", "access-control-request-method": "POST"},
    )
    assert "access-control-allow-origin" not in other.headers


def test_a_browser_can_read_answers_and_errors_of_every_kind(guarded: Running) -> None:
    def ask(key: str, body: dict[str, object]) -> httpx.Response:
        headers = {"origin": PAGE, "authorization": f"Bearer {key}"}
        return httpx.post(f"{guarded.url}/v1/chat/completions", headers=headers, json=body)

    answers = [
        ask("one", CHAT),
        ask("one", {**CHAT, "stream": True}),
        ask("guess", CHAT),
        ask("one", {**CHAT, "model": "nobody"}),
    ]
    with guarded.broken_tokenizer():
        answers.append(ask("one", CHAT))
    assert [answer.status_code for answer in answers] == [200, 200, 401, 404, 500]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == PAGE
        exposed = answer.headers["access-control-expose-headers"].lower()
        assert "x-request-id" in exposed
        assert "retry-after" in exposed
        assert answer.headers["x-request-id"]
