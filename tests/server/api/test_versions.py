"""Versions over HTTP: which there are, going back, canaries, and who an answer says that it comes from."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.api.running import BASE, SECONDS, Files, Running, running

ASK: dict[str, Any] = {"prompt": "hello", "max_tokens": 4, "temperature": 0}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("versions")


@pytest.fixture(scope="module")
def own(files: Files, data: Path) -> Iterator[Running]:
    with running(files, data, admin_key="boss", keep_versions=2) as server:
        yield server


@pytest.fixture
def http(own: Running) -> Iterator[httpx.Client]:
    head = {"authorization": "Bearer boss"}
    with httpx.Client(base_url=own.url, timeout=SECONDS, headers=head) as client:
        for name, source in (("x", "a"), ("other", "c")):
            client.post("/adapters", json={"name": name, "src": source}).raise_for_status()
        yield client
        for each in client.get("/adapters").json()["data"]:
            client.delete(f"/adapters/{each['name']}").raise_for_status()
    own.wait_until_idle()
    own.check_integrity()


def put(http: httpx.Client, source: str, name: str = "x") -> int:
    version: int = http.put(f"/adapters/{name}", json={"src": source}).raise_for_status().json()["version"]
    return version


def told(answer: httpx.Response) -> dict[int, str]:
    assert answer.is_success, answer.text
    return {each["version"]: each["role"] for each in answer.json()["data"]}


def text(http: httpx.Client, model: str, **more: object) -> str:
    answer = http.post("/v1/completions", json={**ASK, "model": model, **more}).raise_for_status()
    found: str = answer.json()["choices"][0]["text"]
    return found


def answered_by(http: httpx.Client, model: str, **more: object) -> str:
    answer = http.post("/v1/completions", json={**ASK, "model": model, **more}).raise_for_status()
    assert answer.json()["system_fingerprint"] == answer.headers["x-manylora-adapter"]
    return answer.headers["x-manylora-adapter"]


def test_versions_are_listed_asked_for_and_gone_back_to(http: httpx.Client) -> None:
    first = http.get("/adapters/x").json()
    old = text(http, "x")
    version = put(http, "b")
    new = text(http, "x")
    assert old != new
    listed = http.get("/adapters/x/versions")
    assert told(listed) == {version: "active", version - 1: "kept"}
    shown = listed.json()
    assert (shown["object"], shown["name"], shown["active"], shown["canary"]) == ("list", "x", version, None)
    assert shown["data"][0]["before"] == version - 1
    assert shown["data"][1]["digest"] == first["digest"]
    assert http.get("/adapters/x").json()["versions"] == [version, version - 1]
    assert (text(http, f"x@{version - 1}"), text(http, f"x@{version}")) == (old, new)
    back = http.post("/adapters/x/rollback")
    assert told(back) == {version: "kept", version - 1: "active"}
    assert text(http, "x") == old
    assert http.get("/adapters/x").json()["id"] == first["id"]
    assert told(http.post("/adapters/x/rollback", json={"version": version}))[version] == "active"
    assert told(http.delete(f"/adapters/x/versions/{version - 1}")) == {version: "active"}


def test_what_can_not_be_is_a_clear_error(http: httpx.Client) -> None:
    version = http.get("/adapters/x").json()["version"]
    asked: tuple[tuple[str, str, object, int, str], ...] = (
        ("POST", "/adapters/x/rollback", None, 409, "no version to go back to"),
        ("POST", "/adapters/x/rollback", {"version": 9999}, 404, f"versions: {version}"),
        ("POST", "/adapters/x/rollback", {"version": version}, 409, "active one already"),
        ("POST", "/adapters/x/rollback", {"version": "1"}, 400, "version"),
        ("POST", "/adapters/x/canary", {"version": version, "share": 0.5}, 409, "is the active one"),
        ("POST", "/adapters/x/canary", {"version": 9999, "share": 0.5}, 404, "versions"),
        ("POST", "/adapters/x/canary", {"src": "b", "share": 1.5}, 400, "share"),
        ("POST", "/adapters/x/canary", {"src": "b", "share": -0.1}, 400, "share"),
        ("POST", "/adapters/x/canary", {"src": "b"}, 400, "share"),
        ("POST", "/adapters/x/canary", {"src": "b", "version": version, "share": 0.5}, 400, "either version"),
        (
            "POST",
            "/adapters/x/canary",
            {"version": version, "token": "t", "share": 0.5},
            400,
            "goes with src",
        ),
        ("POST", "/adapters/x/canary", {"src": "nowhere", "share": 0.5}, 400, "nowhere"),
        ("POST", "/adapters/x/canary/promote", None, 409, "has no canary"),
        ("DELETE", "/adapters/x/canary", None, 409, "has no canary"),
        ("DELETE", f"/adapters/x/versions/{version}", None, 409, "is the active one"),
        ("DELETE", "/adapters/x/versions/9999", None, 404, "no version 9999 of 'x'"),
        ("DELETE", f"/adapters/x/versions/{'9' * 5000}", None, 404, "there is no adapter 'x/versions/9"),
        ("GET", "/adapters/nobody/versions", None, 404, "no adapter 'nobody'"),
        ("POST", "/adapters/nobody/rollback", None, 404, "no adapter 'nobody'"),
        ("POST", "/adapters", {"name": "y/versions", "src": "b"}, 400, "ends as a route"),
        ("POST", "/v1/completions", {**ASK, "model": "x@99"}, 404, f"versions of 'x': {version}"),
        ("POST", "/v1/completions", {**ASK, "model": "x@99:0.5+other"}, 404, f"versions of 'x': {version}"),
        ("POST", "/v1/completions", {**ASK, "model": f"{BASE}@1"}, 404, "has no versions"),
    )
    for method, path, body, status, said in asked:
        answer = http.request(method, path, json=body)
        assert answer.status_code == status, (method, path, answer.text)
        assert said in answer.json()["error"]["message"], answer.text
    assert told(http.get("/adapters/x/versions")) == {version: "active"}


def test_a_canary_is_tried_promoted_and_aborted(http: httpx.Client) -> None:
    version = http.get("/adapters/x").json()["version"]
    made = http.post("/adapters/x/canary", json={"src": "b", "share": 0.5})
    assert made.status_code == 201
    assert made.json()["canary"] == {"version": version + 1, "share": 0.5}
    again = http.post("/adapters/x/canary", json={"src": "b", "share": 1})
    assert (again.status_code, again.json()["canary"]["share"]) == (200, 1.0)
    assert http.get("/adapters/x").json()["canary"] == {"version": version + 1, "share": 1.0}
    assert answered_by(http, "x") == f"x@{version + 1}"
    assert told(http.delete("/adapters/x/canary")) == {version + 1: "kept", version: "active"}
    assert answered_by(http, "x", user="somebody") == f"x@{version}"
    http.post("/adapters/x/canary", json={"version": version + 1, "share": 0.5}).raise_for_status()
    assert told(http.post("/adapters/x/canary/promote")) == {version + 1: "active", version: "kept"}
    assert answered_by(http, "x") == f"x@{version + 1}"


def test_one_user_gets_one_version_by_whatever_field_it_is_named(http: httpx.Client) -> None:
    version = http.get("/adapters/x").json()["version"]
    http.post("/adapters/x/canary", json={"src": "b", "share": 0.5}).raise_for_status()
    body = {"model": "x", **CHAT}
    found = {}
    for number in range(12):
        user = f"u{number}"
        by = {
            http.post(path, json={**asked, **named}).raise_for_status().headers["x-manylora-adapter"]
            for path, asked, named in (
                ("/v1/completions", {**ASK, "model": "x"}, {"user": user}),
                ("/v1/chat/completions", body, {"safety_identifier": user}),
                ("/v1/messages", body, {"metadata": {"user_id": user}}),
                ("/v1/responses", {"model": "x", "input": "x", "max_output_tokens": 3}, {"user": user}),
                ("/v1/embeddings", {"model": "x", "input": "x"}, {"user": user}),
            )
        }
        assert len(by) == 1
        found[user] = by.pop()
    assert set(found.values()) == {f"x@{version}", f"x@{version + 1}"}
    odd = http.post("/v1/completions", json={**ASK, "model": "x", "user": 7, "safety_identifier": ["?"]})
    assert odd.status_code == 200, "what says nothing about who asks is passed over, as ever"


@pytest.mark.parametrize("stream", [False, True])
def test_every_answer_says_who_gave_it(http: httpx.Client, stream: bool) -> None:
    version = {name: http.get(f"/adapters/{name}").json()["version"] for name in ("x", "other")}
    models = {
        BASE: BASE,
        "x": f"x@{version['x']}",
        f"x@{version['x']}:0.5+other": f"x@{version['x']}:0.5+other@{version['other']}:1",
    }
    for model, said in models.items():
        for path, asked in (
            ("/v1/completions", ASK),
            ("/v1/chat/completions", CHAT),
            ("/v1/messages", CHAT),
            ("/v1/responses", {"input": "x", "max_output_tokens": 3}),
        ):
            answer = http.post(path, json={**asked, "model": model, "stream": stream}).raise_for_status()
            assert answer.headers["x-manylora-adapter"] == said, path
            if "completions" in path and not stream:
                assert answer.json()["system_fingerprint"] == said
            elif "completions" in path:
                events = [
                    json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")
                ]
                assert {event["system_fingerprint"] for event in events} == {said}
        for path, asked in (
            ("/v1/embeddings", {"input": "x"}),
            ("/v1/score", {"text_1": "x", "text_2": "y"}),
            ("/v1/rerank", {"query": "x", "documents": ["y"]}),
        ):
            answer = http.post(path, json={**asked, "model": model}).raise_for_status()
            assert answer.headers["x-manylora-adapter"] == said, path


def test_a_version_is_a_model(http: httpx.Client) -> None:
    version = put(http, "b")
    shown = http.get(f"/v1/models/x@{version - 1}").json()
    assert (shown["id"], shown["root"]) == (f"x@{version - 1}", "a")
    assert http.get("/v1/models/x@99").status_code == 404


def test_a_tenant_changes_its_own_names_versions_alone(http: httpx.Client, own: Running) -> None:
    terms = {"tenant": "acme", "rights": ["infer", "manage"], "models": ["x@1", "acme/*"]}
    key = http.post("/admin/keys", json=terms).json()["key"]
    for source in ("a", "b"):
        (own.adapters / "acme").mkdir(exist_ok=True)
        link = own.adapters / "acme" / source
        if not link.exists():
            link.mkdir()
            for each in (own.adapters / source).iterdir():
                (link / each.name).write_bytes(each.read_bytes())
    with httpx.Client(
        base_url=own.url, timeout=SECONDS, headers={"authorization": f"Bearer {key}"}
    ) as tenant:
        tenant.post("/adapters", json={"name": "acme/y", "src": "a"}).raise_for_status()
        put(tenant, "b", "acme/y")
        assert told(tenant.post("/adapters/acme/y/rollback")) == {2: "kept", 1: "active"}
        tried = tenant.post("/adapters/acme/y/canary", json={"version": 2, "share": 1})
        assert tried.json()["canary"] == {"version": 2, "share": 1.0}
        for method, path in (
            ("GET", "/adapters/x/versions"),
            ("POST", "/adapters/x/rollback"),
            ("DELETE", "/adapters/x/canary"),
            ("POST", "/adapters/x/canary/promote"),
            ("DELETE", "/adapters/x/versions/1"),
        ):
            assert tenant.request(method, path).status_code == 404, path


def test_requests_are_counted_by_version_and_changes_are_audited(
    http: httpx.Client, own: Running, data: Path
) -> None:
    version = http.get("/adapters/x").json()["version"]
    text(http, "x")
    put(http, "b")
    for _ in range(2):
        text(http, "x")
    metrics = http.get("/metrics").text
    for number, count in ((version, 1), (version + 1, 2)):
        line = f'manylora_version_requests_total{{adapter="x",version="{number}"}} {count}.0'
        assert line in metrics
    http.post("/adapters/x/rollback").raise_for_status()
    http.post("/adapters/x/canary", json={"version": version + 1, "share": 0.25}).raise_for_status()
    http.post("/adapters/x/canary/promote").raise_for_status()

    def audited() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (data / "audit.jsonl").read_text().splitlines()]

    own.wait_until("written", lambda: "promote" in audited()[-1]["act"])
    said = {each["act"].split("/")[-1]: each for each in audited()[-3:]}
    assert said["rollback"]["versions"] == f"{version + 1} to {version}"
    assert said["canary"]["canary"] == {"version": version + 1, "share": 0.25}
    assert said["promote"]["versions"] == f"{version} to {version + 1}"
