"""Mixtures that have names: made, listed, changed, deleted through HTTP; what they do as their parts come and go."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.server.api.running import BASE, Files, Running, running

PARTS: list[dict[str, object]] = [{"adapter": "a", "weight": 0.7}, {"adapter": "b", "weight": -0.3}]


@pytest.fixture(autouse=True)
def _leave_the_shared_adapters(server: Running, http: httpx.Client) -> Iterator[None]:
    yield
    for each in http.get("/adapters").json()["data"]:
        if each["name"] not in ("a", "b", "c"):
            http.delete(f"/adapters/{each['name']}").raise_for_status()


def make(http: httpx.Client, name: str = "mixed", mixture: object = PARTS) -> httpx.Response:
    return http.post("/adapters", json={"name": name, "mixture": mixture})


def answer(http: httpx.Client, model: str, **more: object) -> str:
    body = {"model": model, "prompt": "hello", "max_tokens": 12, "temperature": 0, **more}
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def test_a_mixture_is_made_shown_listed_and_deleted(http: httpx.Client) -> None:
    made = make(http)
    assert made.status_code == 201
    shown = made.json()
    assert (shown["object"], shown["name"], shown["mixture"]) == ("mixture", "mixed", PARTS)
    assert (shown["state"], shown["reason"]) == ("available", None)
    ids = {name: http.get(f"/adapters/{name}").json()["id"] for name in "ab"}
    assert shown["adapters"] == [
        {"name": "a", "id": ids["a"], "version": 1, "weight": 0.7},
        {"name": "b", "id": ids["b"], "version": 1, "weight": -0.3},
    ]
    assert http.get("/adapters/mixed").json() == shown
    listed = http.get("/adapters").json()["data"]
    assert shown in listed
    names = [each["name"] for each in listed]
    assert names == sorted(names)
    again = make(http, mixture=PARTS[::-1])
    assert (again.status_code, again.json()) == (200, shown)
    assert answer(http, "mixed") == answer(http, "a:0.7+b:-0.3")
    gone = http.delete("/adapters/mixed").json()
    assert (gone["object"], gone["deleted"], gone["mixture"]) == ("mixture", True, PARTS)
    assert http.get("/adapters/mixed").status_code == 404
    assert http.delete("/adapters/mixed").status_code == 404
    assert http.post("/v1/completions", json={"model": "mixed", "prompt": "x"}).status_code == 404


def test_models_lists_it_with_its_parts(http: httpx.Client) -> None:
    make(http)
    [found] = [each for each in http.get("/v1/models").json()["data"] if each["id"] == "mixed"]
    assert (found["parent"], found["root"], found["mixture"]) == (BASE, "a:0.7+b:-0.3", PARTS)
    assert http.get("/v1/models/mixed").json() == found
    assert not any(
        "mixture" in each for each in http.get("/v1/models").json()["data"] if each["id"] != "mixed"
    )


def test_other_parts_are_for_new_requests(server: Running, client: openai.OpenAI, http: httpx.Client) -> None:
    version = make(http).json()["version"]
    old = answer(http, "mixed", max_tokens=400, ignore_eos=True)
    stream = client.completions.create(
        model="mixed",
        prompt="hello",
        max_tokens=400,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    text = next(stream).choices[0].text
    changed = http.put(
        "/adapters/mixed", json={"mixture": [{"adapter": "b"}, {"adapter": "c", "weight": 0.5}]}
    )
    assert (changed.status_code, changed.json()["version"]) == (200, version + 1)
    assert changed.json()["mixture"] == [{"adapter": "b", "weight": 1}, {"adapter": "c", "weight": 0.5}]
    assert answer(http, "mixed") == answer(http, "b+c:0.5")
    http.delete("/adapters/mixed").raise_for_status()
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == old


def test_it_follows_its_parts_and_says_which_is_missing(http: httpx.Client) -> None:
    http.post("/adapters", json={"name": "part", "src": "b"}).raise_for_status()
    make(http, mixture=[{"adapter": "a"}, {"adapter": "part", "weight": 0.5}])
    http.put("/adapters/part", json={"src": "c"}).raise_for_status()
    assert answer(http, "mixed") == answer(http, "a+c:0.5")
    assert http.get("/adapters/mixed").json()["adapters"][1]["version"] == 2
    http.delete("/adapters/part").raise_for_status()
    refused = http.post("/v1/completions", json={"model": "mixed", "prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "adapter_unavailable")
    assert "'part'" in refused.json()["error"]["message"]
    shown = http.get("/adapters/mixed").json()
    assert (shown["state"], shown["mixture"][1]["adapter"]) == ("unavailable", "part")
    assert "'part'" in shown["reason"]
    assert shown["adapters"][1] == {"name": "part", "id": None, "version": None, "weight": 0.5}
    assert "mixed" not in [each["id"] for each in http.get("/v1/models").json()["data"]]
    http.post("/adapters", json={"name": "part", "src": "b"}).raise_for_status()
    assert answer(http, "mixed") == answer(http, "a+b:0.5")
    assert http.get("/adapters/mixed").json()["state"] == "available"


REFUSED: list[tuple[str, str, dict[str, object], int, str | None, str]] = [
    ("POST", "/adapters", {"name": "mixed", "mixture": PARTS[:1]}, 409, None, "exists as a:0.7+b:-0.3"),
    ("POST", "/adapters", {"name": "a", "mixture": PARTS}, 409, None, "'a' is an adapter"),
    ("POST", "/adapters", {"name": "mixed", "src": "a"}, 409, None, "'mixed' is a mixture"),
    ("PUT", "/adapters/mixed", {"src": "a"}, 409, None, "'mixed' is a mixture"),
    ("PUT", "/adapters/a", {"mixture": PARTS}, 409, None, "'a' is an adapter"),
    ("PUT", "/adapters/nobody", {"mixture": PARTS}, 404, None, "there is no mixture 'nobody'"),
    ("POST", "/adapters", {"name": "x"}, 400, None, "give either src"),
    ("POST", "/adapters", {"name": "x", "mixture": []}, 400, None, "give either src"),
    ("POST", "/adapters", {"name": "x", "src": "a", "mixture": PARTS}, 400, None, "give either src"),
    ("PUT", "/adapters/mixed", {}, 400, None, "give either src"),
    ("POST", "/adapters", {"name": "x", "mixture": PARTS, "pin": True}, 400, "pin", "ask it of its parts"),
    (
        "POST",
        "/adapters",
        {"name": "x", "mixture": PARTS, "preload": True},
        400,
        "preload",
        "ask it of its parts",
    ),
    ("PUT", "/adapters/mixed", {"mixture": PARTS, "pin": True}, 400, "pin", "ask it of its parts"),
    ("POST", "/adapters", {"name": "x", "mixture": [{"name": "a"}]}, 400, "mixture.0.name", "says adapter"),
    (
        "POST",
        "/adapters",
        {"name": "x", "mixture": [{"adapter": "mixed"}]},
        400,
        "mixture",
        "'mixed' is a mixture",
    ),
    ("POST", "/adapters", {"name": "x", "mixture": [{"adapter": BASE}]}, 400, "mixture", "is the base"),
    (
        "POST",
        "/adapters",
        {"name": "x", "mixture": [{"adapter": "zz"}]},
        404,
        "mixture",
        "'zz' does not exist",
    ),
    ("POST", "/adapters", {"name": "x", "mixture": PARTS[:1] * 2}, 400, "mixture", "twice"),
    ("POST", "/adapters", {"name": "x+y", "mixture": PARTS}, 400, None, "only letters"),
    ("POST", "/adapters", {"name": BASE, "mixture": PARTS}, 400, None, "the base model"),
    (
        "POST",
        "/v1/load_lora_adapter",
        {"lora_name": "mixed", "lora_path": "a", "load_inplace": True},
        400,
        "lora_name",
        "this route is for single adapters",
    ),
    (
        "POST",
        "/v1/load_lora_adapter",
        {"lora_name": "x", "lora_path": "a", "mixture": PARTS},
        400,
        "mixture",
        "this route is for single adapters",
    ),
    (
        "POST",
        "/v1/unload_lora_adapter",
        {"lora_name": "mixed"},
        400,
        "lora_name",
        "this route is for single adapters",
    ),
    ("DELETE", "/adapters/mixed?abort=true", {}, 400, "abort", "those of its adapters"),
]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param", "says"), REFUSED, ids=lambda each: str(each)[:50]
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(
    http: httpx.Client,
    method: str,
    path: str,
    body: dict[str, object],
    status: int,
    param: str | None,
    says: str,
) -> None:
    make(http).raise_for_status()
    before = http.get("/adapters").json()
    refused = http.request(method, path, json=None if method == "DELETE" else body)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (status, param)
    assert says in error["message"]
    tiers = [{**each, "tier": None} for each in before["data"]]
    assert [{**each, "tier": None} for each in http.get("/adapters").json()["data"]] == tiers


def test_it_is_there_again_after_a_restart(files: Files, tmp_path: Path) -> None:
    with running(files, tmp_path) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        for name in "ab":
            http.post("/adapters", json={"name": name, "src": name}).raise_for_status()
        made = make(http).json()
        text = answer(http, "mixed")
    with running(files, tmp_path) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        assert http.get("/adapters/mixed").json() == made
        assert answer(http, "mixed") == text


@pytest.mark.parametrize("most", [2, 10])
def test_the_number_of_parts_is_a_setting(files: Files, tmp_path: Path, most: int) -> None:
    with (
        running(files, tmp_path, max_mixture_parts=most) as server,
        httpx.Client(base_url=server.url, timeout=30) as http,
    ):
        for number in range(most + 1):
            http.post("/adapters", json={"name": f"a{number}", "src": "b"}).raise_for_status()
        parts = [{"adapter": f"a{number}", "weight": 0.1} for number in range(most + 1)]
        assert make(http, mixture=parts[:most]).status_code == 201
        refused = make(http, "more", parts)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "mixture")
        assert f"at most {most}" in refused.json()["error"]["message"]


def test_the_log_says_which_parts_a_request_got(server: Running, http: httpx.Client) -> None:
    ids = {name: http.get(f"/adapters/{name}").json()["id"] for name in "ab"}
    told = f"a@1#{ids['a']}:0.7+b@1#{ids['b']}:-0.3"

    def line(body: dict[str, object], path: str = "/v1/completions") -> dict[str, object]:
        with server.logged() as lines:
            http.post(path, json=body)
            server.wait_until("logged", lambda: bool(lines))
        [found] = lines
        return dict(found)

    made = line({"name": "mixed", "mixture": PARTS}, "/adapters")
    assert (made["name"], made["mixture"]) == ("mixed", "a:0.7+b:-0.3")
    body: dict[str, object] = {"prompt": "x", "max_tokens": 1}
    for model in ("mixed", "a:0.7+b:-0.3"):
        found = line({"model": model, **body})
        assert (found["model"], found["adapters"]) == (model, told)
    beside = [{"name": "a", "weight": 0.7}, {"name": "b", "weight": -0.3}]
    found = line({"model": BASE, "adapters": beside, **body})
    assert (found["model"], found["adapters"]) == (BASE, told)
    assert "adapters" not in line({"model": "a", **body})
