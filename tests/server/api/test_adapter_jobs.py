"""Registrations as jobs: begun, told of, cancelled, failed; and models that are looked for when they are asked for."""

import json
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest

from manylora.adapters.sending import opened_parts
from manylora.server.catalog import registrations
from tests.adapters.sources.web_host import Host, web_host
from tests.server.api.running import Files, Running, running
from tests.server.api.tenants import new_key
from tests.server.api.test_adapters import answer

ADMIN = {"authorization": "Bearer boss"}


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with web_host() as host:
        yield host


def held_up(host: Host, path: str, adapter: Path) -> Event:
    """Have a host offer an adapter whose weights it sends once the event is set."""
    go_on = Event()
    host.put(path, adapter)
    host.things[f"{path}/adapter_model.safetensors"].on_get = lambda: go_on.wait(30)
    return go_on


@pytest.fixture(scope="module")
def shelf(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models are looked for."""
    shelf = tmp_path_factory.mktemp("shelf")
    for name in ("b", "acme/own", "other/own"):
        shutil.copytree(files.adapters / "b", shelf / name)
    (shelf / "broken").mkdir()
    (shelf / "broken" / "adapter_config.json").write_text("{}")
    return shelf


@pytest.fixture(scope="module")
def own(files: Files, host: Host, shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(
        files,
        tmp_path_factory.mktemp("own"),
        admin_key="boss",
        allow_source=(host.url,),
        private_sources=True,
        resolve=str(shelf),
    ) as server:
        yield server


@pytest.fixture
def http(own: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=own.url, timeout=30, headers=ADMIN) as client:
        yield client
        for each in client.get("/adapters").json()["data"]:
            client.delete(f"/adapters/{each['name']}").raise_for_status()


def state(http: httpx.Client, name: str) -> object:
    return http.get(f"/adapters/{name}").json().get("state")


def begin(http: httpx.Client, name: str, src: str, **more: object) -> httpx.Response:
    return http.post("/adapters", json={"name": name, "src": src, **more}, params={"wait": "false"})


def test_a_registration_is_told_of_while_it_goes_on(
    http: httpx.Client, own: Running, host: Host, files: Files
) -> None:
    go_on = held_up(host, "/slow", files.adapters / "b")
    begun = begin(http, "slow", f"{host.url}/slow")
    assert begun.status_code == 202
    assert begun.headers["location"] == "/adapters/slow"
    own.wait_until("downloading", lambda: state(http, "slow") == "downloading")
    own.wait_until("some", lambda: bool(http.get("/adapters/slow").json()["bytes"]))
    told = http.get("/adapters/slow").json()
    assert (told["object"], told["name"], told["src"]) == ("adapter.registration", "slow", f"{host.url}/slow")
    assert 0 < told["progress"] < 1
    assert told["total_bytes"] == sum(path.stat().st_size for path in (files.adapters / "b").iterdir())
    assert told in http.get("/adapters").json()["data"]
    # Not there for requests; the same again is the same registration, and another source has to wait.
    assert http.post("/v1/completions", json={"model": "slow", "prompt": "x"}).status_code == 404
    assert begin(http, "slow", f"{host.url}/slow").json()["created"] == told["created"]
    assert begin(http, "slow", "b").json()["error"]["code"] == "adapter_name_taken"
    # A slow host holds no directory up.
    assert http.post("/adapters", json={"name": "quick", "src": "b"}).status_code == 201
    go_on.set()
    own.wait_until("available", lambda: state(http, "slow") == "available")
    assert http.get("/adapters/slow").json()["registration"] is None
    assert answer(http, "slow") == answer(http, "quick")
    # What is known of a version isn't downloaded again.
    before = len(host.gets("/slow/adapter_model.safetensors"))
    assert http.post("/adapters", json={"name": "slow", "src": f"{host.url}/slow"}).status_code == 200
    assert len(host.gets("/slow/adapter_model.safetensors")) == before


def test_what_somebody_waits_for_is_nobody_elses_job(
    http: httpx.Client, own: Running, host: Host, files: Files
) -> None:
    go_on = held_up(host, "/shared", files.adapters / "b")
    src = f"{host.url}/shared"
    running = own.server.catalog.registrations._running
    body = json.dumps({"name": "shared", "src": src})
    head = (
        "POST /adapters HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"authorization: {ADMIN['authorization']}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", own.port), timeout=10) as waiting:
        waiting.sendall((head + body).encode())
        own.wait_until("downloading", lambda: state(http, "shared") == "downloading")
        assert begin(http, "shared", src).status_code == 202
    own.wait_until("gone", lambda: len(running["shared"]) == 1)
    # What is wished besides is heard, and the same again is the same.
    for _ in range(2):
        assert begin(http, "shared", src, preload=True).status_code == 202
    assert len(running["shared"]) == 2
    go_on.set()
    own.wait_until("ended", lambda: "shared" not in running)
    served = http.get("/adapters/shared").json()
    assert (served["state"], served["preload"], served["version"]) == ("available", True, 1)


def test_so_many_are_begun_at_the_same_time(
    http: httpx.Client, own: Running, host: Host, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registrations, "MOST_UNDER_WAY", 1)
    go_on = held_up(host, "/one", files.adapters / "b")
    assert begin(http, "one", f"{host.url}/one").status_code == 202
    refused = begin(http, "two", "b")
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) > 0
    assert begin(http, "one", f"{host.url}/one").status_code == 202
    assert http.post("/adapters", json={"name": "two", "src": "b"}).status_code == 201
    go_on.set()
    own.wait_until("available", lambda: state(http, "one") == "available")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/adapters", {"name": "x", "src": ""}),
        ("/adapters/x/canary", {"share": 0.5, "src": ""}),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": ""}),
    ],
)
def test_a_source_has_an_end(http: httpx.Client, path: str, body: dict[str, object]) -> None:
    if "canary" in path:
        http.post("/adapters", json={"name": "x", "src": "b"}).raise_for_status()
    field = next(name for name, value in body.items() if value == "")
    refused = http.post(path, json={**body, field: "x/" * 2049})
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, field)
    assert "at most 4096 characters" in error["message"]


def test_a_failure_can_be_read_for_a_while(
    http: httpx.Client, own: Running, host: Host, files: Files
) -> None:
    host.put("/bad", files.adapters / "b")
    host.things["/bad/adapter_model.safetensors"].body = b"cut"
    assert begin(http, "bad", f"{host.url}/bad").status_code == 202
    own.wait_until("failed", lambda: state(http, "bad") == "failed")
    told = http.get("/adapters/bad").json()
    assert told["code"] == "invalid_adapter"
    assert "adapter_model.safetensors" in told["reason"]
    assert http.delete("/adapters/bad").json()["deleted"] is True
    assert http.get("/adapters/bad").status_code == 404
    # One for the next version of what is served is told of beside it.
    http.post("/adapters", json={"name": "bad", "src": "b"}).raise_for_status()
    body = {"src": f"{host.url}/bad"}
    assert http.put("/adapters/bad", json=body, params={"wait": "false"}).status_code == 202
    own.wait_until("failed", lambda: http.get("/adapters/bad").json()["registration"]["state"] == "failed")
    assert state(http, "bad") == "available"
    for name, error in (("a b", 400), ("tiny", 400)):
        assert begin(http, name, "b").status_code == error
    assert http.put("/adapters/none", json={"src": "b"}, params={"wait": "false"}).status_code == 404
    assert http.get("/adapters/none").status_code == 404


def test_a_delete_cancels_what_is_under_way(
    http: httpx.Client, own: Running, host: Host, files: Files
) -> None:
    go_on = held_up(host, "/gone", files.adapters / "b")
    with ThreadPoolExecutor(1) as pool:
        body = {"name": "gone", "src": f"{host.url}/gone"}
        waiting = pool.submit(lambda: httpx.post(f"{own.url}/adapters", json=body, headers=ADMIN, timeout=30))
        own.wait_until("downloading", lambda: state(http, "gone") == "downloading")
        cancelled = http.delete("/adapters/gone").json()
        assert (cancelled["state"], cancelled["deleted"]) == ("cancelled", True)
        refused = waiting.result()
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "registration_cancelled")
        go_on.set()
    assert http.get("/adapters/gone").status_code == 404
    store = own.server.catalog._store
    own.wait_until("swept", lambda: list((store._root / ".staging").iterdir()) == [])
    assert http.delete("/adapters/gone").status_code == 404


def roles(http: httpx.Client, name: str) -> dict[int, str]:
    listed = http.get(f"/adapters/{name}/versions").raise_for_status()
    return {each["version"]: each["role"] for each in listed.json()["data"]}


def test_a_canary_is_sent_as_an_adapter_is(http: httpx.Client, own: Running, files: Files) -> None:
    first = http.post("/adapters", json={"name": "x", "src": "b"}).raise_for_status().json()["version"]
    store = own.server.catalog._store

    def send(share: str, name: str = "a", **query: str) -> httpx.Response:
        with opened_parts(files.adapters / name) as parts:
            return http.post("/adapters/x/canary", data={"share": share}, files=parts, params=query)

    made = send("0.25")
    assert made.status_code == 201, made.text
    assert made.json()["canary"] == {"version": first + 1, "share": 0.25}
    tried = made.json()["data"][0]
    assert (tried["src"], tried["role"], tried["rank"]) == ("upload", "canary", 8)
    again = send("1")
    assert (again.status_code, again.json()["canary"]["share"]) == (200, 1.0)
    as_job = send("0.5", wait="false")
    assert (as_job.status_code, as_job.json()["share"], as_job.json()["src"]) == (202, 0.5, "upload")
    own.wait_until("tried", lambda: http.get("/adapters/x").json()["canary"]["share"] == 0.5)
    assert send("0.5", "b").json()["error"]["code"] == "version_conflict", "these are the active weights"
    for share, why in (("", "share: give it before"), ("x", "a number"), ("1.5", "share"), ("true", "share")):
        refused = send(share)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "share"), refused.text
        assert why in refused.json()["error"]["message"]
    assert send("0.5", wait="maybe").status_code == 400
    for field, param in (("name", "name"), ("version", "version"), ("pin", "pin")):
        form = {"share": "0.5", field: "1"}
        refused = http.post("/adapters/x/canary", data=form, files={"file": ("adapter_config.json", b"{}")})
        assert refused.json()["error"] == {
            "message": f"{field}: not a field of this form",
            "type": "invalid_request_error",
            "param": param,
            "code": None,
        }
    spoilt = http.post("/adapters/x/canary", data={"share": "1"}, files={"file": ("a.zip", b"PK")})
    assert spoilt.json()["error"]["code"] == "invalid_adapter"
    nobody = http.post("/adapters/none/canary", data={"share": "1"}, files={"file": ("a.zip", b"PK")})
    assert nobody.status_code == 404
    assert roles(http, "x") == {first + 1: "canary", first: "active"}
    own.wait_until("swept", lambda: list((store._root / ".staging").iterdir()) == [])


def test_a_canary_may_be_a_job(http: httpx.Client, own: Running, host: Host, files: Files) -> None:
    go_on = held_up(host, "/next", files.adapters / "a")
    body: dict[str, object] = {"src": f"{host.url}/next", "share": 0.5}
    version = http.post("/adapters", json={"name": "x", "src": "b"}).raise_for_status().json()["version"]

    def begin_canary() -> dict[str, object]:
        begun = http.post("/adapters/x/canary", json=body, params={"wait": "false"})
        assert (begun.status_code, begun.headers["location"]) == (202, "/adapters/x"), begun.text
        own.wait_until("downloading", lambda: shown()["registration"]["state"] == "downloading")
        told: dict[str, object] = begun.json()
        return told

    def shown() -> dict[str, Any]:
        found: dict[str, Any] = http.get("/adapters/x").json()
        return found

    told = begin_canary()
    assert (told["src"], told["share"]) == (body["src"], 0.5)
    assert (shown()["registration"]["share"], shown()["canary"]) == (0.5, None)
    assert begin_canary()["created"] == told["created"], "the same again is the same"
    other = http.put("/adapters/x", json={"src": "a"}, params={"wait": "false"})
    assert other.json()["error"]["code"] == "adapter_name_taken"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(
            lambda: httpx.post(f"{own.url}/adapters/x/canary", json=body, headers=ADMIN, timeout=30)
        )
        running = own.server.catalog.registrations._running
        own.wait_until("two", lambda: len(running["x"]) == 2)
        # Its cancelling ends both, and nothing else: the name is served as it was.
        ended = http.delete("/adapters/x/canary")
        assert (ended.status_code, ended.json()["active"], ended.json()["canary"]) == (200, version, None)
        assert waiting.result().json()["error"]["code"] == "registration_cancelled"
    assert (roles(http, "x"), shown()["registration"]) == ({version: "active"}, None)
    assert http.delete("/adapters/x/canary").json()["error"]["code"] == "version_conflict"
    begin_canary()
    go_on.set()
    own.wait_until("tried", lambda: shown()["canary"] == {"version": version + 1, "share": 0.5})
    assert shown()["registration"] is None
    # One that failed is told of, until its end is asked for.
    host.things["/next/adapter_model.safetensors"].body = b"cut"
    assert http.delete("/adapters/x/canary").status_code == 200
    assert http.post("/adapters/x/canary", json=body, params={"wait": "false"}).status_code == 202
    own.wait_until("failed", lambda: shown()["registration"]["state"] == "failed")
    assert shown()["registration"]["code"] == "invalid_adapter"
    assert http.delete("/adapters/x/canary").status_code == 200
    assert (shown()["registration"], state(http, "x")) == (None, "available")
    for missing in ("none", "x@9"):
        refused = http.post(f"/adapters/{missing}/canary", json=body, params={"wait": "false"})
        assert refused.status_code == 404, refused.text


def test_a_replacement_that_is_on_its_way_is_no_canarys_to_end(
    http: httpx.Client, own: Running, host: Host, files: Files
) -> None:
    go_on = held_up(host, "/put", files.adapters / "a")
    version = http.post("/adapters", json={"name": "x", "src": "b"}).raise_for_status().json()["version"]
    body = {"src": f"{host.url}/put"}
    assert http.put("/adapters/x", json=body, params={"wait": "false"}).status_code == 202
    assert http.delete("/adapters/x/canary").json()["error"]["code"] == "version_conflict"
    go_on.set()
    own.wait_until("replaced", lambda: http.get("/adapters/x").json()["version"] == version + 1)


def test_a_model_is_looked_for_when_it_is_first_asked_for(http: httpx.Client, own: Running) -> None:
    with ThreadPoolExecutor(6) as pool:
        answers = set(pool.map(lambda _: answer(http, "b"), range(6)))
    assert len(answers) == 1
    record = http.get("/adapters/b").json()
    assert (record["version"], record["state"]) == (1, "available")
    assert answer(http, "b:0.5") != answers.pop()
    missing = http.post("/v1/completions", json={"model": "nowhere", "prompt": "x"})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    broken = http.post("/v1/completions", json={"model": "broken", "prompt": "x"})
    assert (broken.status_code, broken.json()["error"]["code"]) == (503, "adapter_unavailable")
    assert "adapter_model.safetensors" in broken.json()["error"]["message"]
    for odd in ("../b", "b/..", "/b", "b\0", "x" * 200, "a b"):
        assert http.post("/v1/completions", json={"model": odd, "prompt": "x"}).status_code in (400, 404)
    for path in ("/tokenize", "/v1/messages/count_tokens"):
        http.delete("/adapters/b")
        body = {"model": "b", "prompt": "x"} if path == "/tokenize" else {"model": "b", "messages": []}
        http.post(path, json=body)
        assert path == "/v1/messages/count_tokens" or state(http, "b") == "available"


def test_a_tenant_has_its_own_and_nobodys_looked_for(http: httpx.Client, own: Running) -> None:
    key = new_key(own, "acme", models=["*"])
    as_tenant = {"authorization": f"Bearer {key}"}

    def ask(model: str) -> int:
        body = {"model": model, "prompt": "x", "max_tokens": 1}
        return httpx.post(f"{own.url}/v1/completions", json=body, headers=as_tenant, timeout=30).status_code

    assert ask("acme/own") == 200
    assert ask("b") == 200
    assert ask("other/own") == 404
    assert http.get("/adapters/other/own").status_code == 404
