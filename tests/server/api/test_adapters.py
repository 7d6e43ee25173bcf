"""Adapters through HTTP: register, list, replace, delete while requests run; bad directories."""

import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from manylora.loadtest.material.checkpoints import AdapterShape, write_adapter
from tests.server.api.running import BASE, TEMPLATE, Files, Running

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def _leave_the_shared_adapters(server: Running, http: httpx.Client) -> Iterator[None]:
    yield
    for adapter in http.get("/adapters").json()["data"]:
        if adapter["name"] not in ("a", "b", "c"):
            http.delete(f"/adapters/{adapter['name']}?abort=true").raise_for_status()


@pytest.fixture
def directory(files: Files) -> Iterator[Path]:
    """A directory below the adapter root, for this test's adapters."""
    path = files.adapters / "made"
    path.mkdir()
    yield path
    shutil.rmtree(path)


def answer(http: httpx.Client, model: str, **more: object) -> str:
    body = {"model": model, "prompt": "hello", "max_tokens": 12, "temperature": 0, **more}
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def test_an_adapter_is_registered_listed_and_deleted(http: httpx.Client) -> None:
    made = http.post("/adapters", json={"name": "first", "src": "b", "preload": True, "pin": True})
    assert made.status_code == 201
    record = made.json()
    assert (record["object"], record["name"], record["version"], record["rank"]) == ("adapter", "first", 1, 4)
    assert (record["pin"], record["preload"], record["src"]) == (True, True, "b")
    assert record["target_modules"] == ["q_proj", "v_proj"]
    shown = http.get("/adapters/first").json()
    assert (shown["state"], shown["tier"], shown["reason"]) == ("available", "device", None)
    assert shown.items() >= record.items()
    assert shown.pop("auto") == {"description": None, "examples": [], "threshold": None}
    assert shown in http.get("/adapters").json()["data"]
    assert answer(http, "first") == answer(http, "b")
    gone = http.delete("/adapters/first").json()
    assert gone["deleted"] is True
    # Rank 4 on q_proj and v_proj.
    assert gone["freed"]["arena_rows"] == 8
    assert gone["freed"]["device_bytes"] > 0
    assert gone["freed"]["host_bytes"] > 0
    assert gone["freed"]["aborted_sequences"] == 0
    assert http.get("/adapters/first").status_code == 404
    assert http.delete("/adapters/first").json()["error"]["code"] == "model_not_found"


def test_what_an_adapter_weighs_and_how_it_is_used_is_told(http: httpx.Client, files: Files) -> None:
    parts = [{"adapter": "weighed"}, {"adapter": "a", "weight": 0.5}]
    http.post("/adapters", json={"name": "weighed", "src": "b"}).raise_for_status()
    fresh = http.get("/adapters/weighed").json()
    kept = ("adapter_config.json", "adapter_model.safetensors")
    assert fresh["bytes"] == sum((files.adapters / "b" / name).stat().st_size for name in kept)
    assert (fresh["requests"], fresh["last_used"]) == (0, None)
    http.post("/adapters", json={"name": "named", "mixture": parts}).raise_for_status()
    before = time.time()
    for model in ("weighed", "named", "weighed:0.5+a"):
        answer(http, model)
    used = {each["name"]: each for each in http.get("/adapters").json()["data"]}
    assert [used[name]["requests"] for name in ("weighed", "named")] == [3, 1]
    assert all(int(before) <= used[name]["last_used"] <= time.time() for name in ("weighed", "named"))
    # Another version is another adapter, and a name that is given again begins anew.
    http.put("/adapters/weighed", json={"src": "c"}).raise_for_status()
    assert http.get("/adapters/weighed").json()["requests"] == 0
    http.delete("/adapters/named").raise_for_status()
    assert http.post("/adapters", json={"name": "named", "mixture": parts}).json()["requests"] == 0
    http.delete("/adapters/named").raise_for_status()


def test_names_may_hold_slashes_and_colons(http: httpx.Client) -> None:
    assert http.post("/adapters", json={"name": "team/sql:v2", "src": "b"}).status_code == 201
    assert http.get("/adapters/team/sql:v2").json()["name"] == "team/sql:v2"
    assert http.get("/v1/models/team/sql:v2").json()["id"] == "team/sql:v2"
    assert answer(http, "team/sql:v2") == answer(http, "b")


def test_the_same_weights_again_are_the_same_adapter(http: httpx.Client) -> None:
    first = http.post("/adapters", json={"name": "new", "src": "b"})
    again = http.post("/adapters", json={"name": "new", "src": "b"})
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["id"] == again.json()["id"]


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_the_same_weights_again_take_pin_and_preload(http: httpx.Client, method: str) -> None:
    made = http.post("/adapters", json={"name": "new", "src": "b"}).json()
    path, named = ("/adapters", {"name": "new"}) if method == "POST" else ("/adapters/new", {})
    again = http.request(method, path, json={**named, "src": "b", "pin": True, "preload": True})
    assert again.status_code == 200
    assert (again.json()["id"], again.json()["pin"], again.json()["preload"]) == (made["id"], True, True)
    shown = http.get("/adapters/new").json()
    assert (shown["tier"], shown["pin"], shown["preload"]) == ("device", True, True)
    http.request(method, path, json={**named, "src": "b", "pin": False}).raise_for_status()
    shown = http.get("/adapters/new").json()
    assert (shown["pin"], shown["preload"]) == (False, True)


def test_an_adapter_that_never_fits_the_arena_is_400(
    files: Files, directory: Path, http: httpx.Client
) -> None:
    write_adapter(directory / "wide", files.base, AdapterShape(rank=129, seed=9))
    refused = http.post("/adapters", json={"name": "new", "src": "made/wide"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported_adapter")
    assert "--arena-rows" in refused.json()["error"]["message"]


def test_fifty_at_once_make_one_adapter(server: Running, http: httpx.Client) -> None:
    with httpx.Client(base_url=server.url, timeout=30) as client, ThreadPoolExecutor(16) as pool:
        answers = list(
            pool.map(lambda _: client.post("/adapters", json={"name": "new", "src": "b"}), range(50))
        )
    assert sorted(each.status_code for each in answers) == [200] * 49 + [201]
    assert len({each.json()["id"] for each in answers}) == 1


def test_a_name_with_other_weights_is_taken(http: httpx.Client) -> None:
    taken = http.post("/adapters", json={"name": "a", "src": "b"})
    assert taken.status_code == 409
    assert taken.json()["error"]["code"] == "adapter_name_taken"


@pytest.mark.parametrize("name", [BASE, "", "a b", "../x", "x/", "é", "x" * 129])
def test_a_bad_name_is_400(http: httpx.Client, name: str) -> None:
    assert http.post("/adapters", json={"name": name, "src": "b"}).status_code == 400


def test_an_adapters_own_template_is_used(http: httpx.Client) -> None:
    http.post("/adapters", json={"name": "templated", "src": "templated"}).raise_for_status()
    messages = [{"role": "user", "content": "hello"}]
    chat = {"messages": messages, "max_tokens": 8, "temperature": 0}
    by_template = http.post("/v1/chat/completions", json={"model": "templated", **chat}).json()
    assert TEMPLATE.endswith(" END")
    plain = {"prompt": "hello END", "max_tokens": 8, "temperature": 0}
    same = http.post("/v1/completions", json={"model": "a", **plain}).json()
    assert by_template["choices"][0]["message"]["content"] == same["choices"][0]["text"]
    assert by_template["usage"]["prompt_tokens"] == same["usage"]["prompt_tokens"]
    tokens = http.post("/tokenize", json={"model": "templated", "messages": messages}).json()
    assert tokens["count"] == same["usage"]["prompt_tokens"]


def test_a_running_stream_keeps_the_version_that_it_began_with(
    server: Running, client: openai.OpenAI, http: httpx.Client
) -> None:
    first = http.post("/adapters", json={"name": "new", "src": "b"}).json()
    old = answer(http, "new", max_tokens=400, ignore_eos=True)
    stream = client.completions.create(
        model="new",
        prompt="hello",
        max_tokens=400,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    text = next(stream).choices[0].text
    replaced = http.put("/adapters/new", json={"src": "c"})
    assert (replaced.status_code, replaced.json()["version"]) == (200, first["version"] + 1)
    assert answer(http, "new") == answer(http, "c")
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == old
    assert http.put("/adapters/nobody", json={"src": "c"}).status_code == 404


def test_deleting_lets_running_requests_finish(server: Running, http: httpx.Client) -> None:
    http.post("/adapters", json={"name": "new", "src": "b"}).raise_for_status()
    with httpx.Client(base_url=server.url, timeout=30) as client, ThreadPoolExecutor(8) as pool:
        running = [pool.submit(answer, client, "new", n=4, max_tokens=200, ignore_eos=True) for _ in range(4)]
        server.wait_until("all running", lambda: server.server.engine.snapshot().running == 16)
        deletion = pool.submit(client.delete, "/adapters/new")
        server.wait_until("refused", lambda: client.get("/adapters/new").status_code == 404)
        late = client.post("/v1/completions", json={"model": "new", "prompt": "x"})
        assert late.status_code == 404
        assert len({each.result() for each in running}) == 1
        assert deletion.result().json()["freed"]["aborted_sequences"] == 0


def test_deleting_with_abort_tells_running_requests(server: Running, http: httpx.Client) -> None:
    http.post("/adapters", json={"name": "new", "src": "b"}).raise_for_status()
    body = {"model": "new", "prompt": "x", "n": 2, "max_tokens": 1000, "ignore_eos": True}
    with httpx.Client(base_url=server.url, timeout=30) as client, ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.post, "/v1/completions", json=body)
        server.wait_until("all running", lambda: server.server.engine.snapshot().running == 2)
        freed = client.delete("/adapters/new?abort=true").json()["freed"]
        assert freed["aborted_sequences"] == 2
        assert running.result().status_code == 404
        assert running.result().json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("src", ["../base", "/etc", "b/../../base", "file:///etc", "link", "made/linked"])
def test_a_path_out_of_the_root_is_403(files: Files, directory: Path, http: httpx.Client, src: str) -> None:
    link = files.adapters / "link"
    link.symlink_to(files.base)
    (directory / "linked").mkdir()
    (directory / "linked" / CONFIG).symlink_to(files.base / "config.json")
    try:
        refused = http.post("/adapters", json={"name": "new", "src": src})
    finally:
        link.unlink()
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "adapter_path_forbidden"


@pytest.mark.parametrize("src", ["nowhere", "org/name", "ftp://example.com/a"])
def test_a_source_that_is_not_there_or_not_served_is_400(http: httpx.Client, src: str) -> None:
    assert http.post("/adapters", json={"name": "new", "src": src}).status_code == 400


def change_config(**fields: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / CONFIG).read_text())
        (path / CONFIG).write_text(json.dumps(config | fields))

    return change


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        tensors = load_file(path / WEIGHTS)
        change(tensors)
        save_file(tensors, path / WEIGHTS)

    return rewrite


def truncate(path: Path) -> None:
    content = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(content[:-100])


def to_pickle(path: Path) -> None:
    torch.save(load_file(path / WEIGHTS), path / "adapter_model.bin")
    (path / WEIGHTS).unlink()


Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
NOT_A_MODULE = "base_model.model.model.layers.0.self_attn.z_proj.lora_A.weight"
SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda path: (path / CONFIG).unlink(), CONFIG),
    "config is not JSON": (lambda path: (path / CONFIG).write_text("{"), CONFIG),
    "no weights": (lambda path: (path / WEIGHTS).unlink(), WEIGHTS),
    "pickle": (to_pickle, "adapter_model.bin"),
    "not safetensors": (lambda path: (path / WEIGHTS).write_bytes(b"x" * 100), WEIGHTS),
    "truncated": (truncate, WEIGHTS),
    "a tensor missing": (change_tensors(lambda tensors: tensors.pop(Q_A)), "layers.0.self_attn.q_proj"),
    "a tensor left over": (
        change_tensors(lambda tensors: tensors.update({NOT_A_MODULE: torch.ones(4, 128)})),
        NOT_A_MODULE,
    ),
    "a wrong shape": (change_tensors(lambda tensors: tensors.update({Q_A: torch.ones(4, 64)})), Q_A),
    "NaN": (change_tensors(lambda tensors: tensors[Q_A].fill_(float("nan"))), Q_A),
    "no module fits": (change_config(target_modules=["z_proj"]), "z_proj"),
    "DoRA without lengths": (change_config(use_dora=True), "lora_magnitude_vector"),
    "modules_to_save": (change_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "not LoRA": (change_config(peft_type="IA3"), "IA3"),
    "a rank over the limit": (change_config(r=512), "512"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_spoilt_adapter_is_400_and_changes_nothing(
    files: Files, directory: Path, http: httpx.Client, kind: str
) -> None:
    spoil, named = SPOILT[kind]
    spoilt = write_adapter(directory / "spoilt", files.base, AdapterShape(rank=4, seed=9))
    spoil(spoilt)
    before = answer(http, "a"), as_registered(http)
    for method, path in (("POST", "/adapters"), ("PUT", "/adapters/a")):
        body = {"src": "made/spoilt"} | ({"name": "new"} if method == "POST" else {})
        refused = http.request(method, path, json=body)
        assert refused.status_code == 400, refused.text
        error = refused.json()["error"]
        assert error["code"] in ("invalid_adapter", "unsupported_adapter", "adapter_not_found")
        assert named in error["message"]
        assert str(files.root) not in error["message"]
    assert (answer(http, "a"), as_registered(http)) == before
    assert http.get("/ready").status_code == 200


def as_registered(http: httpx.Client) -> list[dict[str, object]]:
    """All adapters, without how often they were asked for."""
    counts = ("requests", "last_used")
    listed = http.get("/adapters").json()["data"]
    return [{key: value for key, value in each.items() if key not in counts} for each in listed]


def test_weights_that_overflow_fail_their_requests_alone(
    files: Files, directory: Path, http: httpx.Client
) -> None:
    """Finite in the file, not in the logits: that request gets a 500, its neighbours nothing."""
    shape = AdapterShape(rank=4, targets=("v_proj", "o_proj"), strength=1e30)
    write_adapter(directory / "wild", files.base, shape)
    http.post("/adapters", json={"name": "wild", "src": "made/wild"}).raise_for_status()
    expected = answer(http, "a", max_tokens=100)
    with ThreadPoolExecutor(2) as pool:
        neighbour = pool.submit(answer, http, "a", max_tokens=100)
        failed = http.post("/v1/completions", json={"model": "wild", "prompt": "x"})
        assert neighbour.result() == expected
    assert failed.status_code == 500
    assert failed.json()["error"]["code"] == "step_failed"
    assert "not finite" in failed.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/adapters", {"name": "new", "src": "b"}),
        ("PUT", "/adapters/old", {"src": "c"}),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "b"}),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "old", "lora_path": "c", "load_inplace": True}),
    ],
)
def test_a_registration_whose_client_hung_up_is_undone(
    server: Running, http: httpx.Client, method: str, path: str, body: dict[str, object]
) -> None:
    def ids() -> dict[str, int]:
        return {each["name"]: each["id"] for each in http.get("/adapters").json()["data"]}

    http.post("/adapters", json={"name": "old", "src": "b"}).raise_for_status()
    before = ids()
    catalog = server.server.catalog
    with ThreadPoolExecutor(1) as pool, server.held():
        busy = pool.submit(answer, http, "a")
        server.wait_until_busy()
        content = json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(content)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head.encode() + content)
            # The engine is held in a step: there the operation waits for its turn.
            server.wait_until("handed over", lambda: bool(server.server.engine._calls))
        server.wait_until("heard", lambda: all(caller.left for caller in catalog._operations.callers))
    busy.result()
    server.start(catalog.settled()).result(30)
    assert ids() == before


def test_a_client_that_leaves_leaves_no_half_made_adapter(server: Running, http: httpx.Client) -> None:
    with httpx.Client(base_url=server.url, timeout=0.001) as client, pytest.raises(httpx.TimeoutException):
        client.post("/adapters", json={"name": "new", "src": "b"})
    # Whether it came to be or not, the name can be registered now.
    assert http.post("/adapters", json={"name": "new", "src": "b"}).status_code in (200, 201)
    assert answer(http, "new") == answer(http, "b")
