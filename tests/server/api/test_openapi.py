"""/openapi.json against what the routes do, and /docs, which shows it."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis

# It would be read when it is first needed, with pytest's rewriting, while a server's thread parses Python too:
# CPython's parser counts the depth of both in one place, and fails now and then.
import schemathesis.specs.openapi.schemas

from manylora.loadtest.checks.api_fuzz import CHECKS, Known, fuzz, other_keys
from manylora.server.api.answers import CompletionChunk, ErrorAnswer
from manylora.server.api.chat_answers import ChatCompletionChunk
from manylora.server.api.documented import OPERATIONS
from tests.server.api.running import BASE, Files, Running, running

CHAT: dict[str, object] = {"model": "a", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
COMPLETION: dict[str, object] = {"model": "a", "prompt": "x", "max_tokens": 2}
LINE = json.dumps({"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": COMPLETION}).encode()
PARTS = [{"name": "a", "weight": 0.5}, {"name": "b"}]
EXAMPLES, SEED = 4, 3
KEY = "boss"
HEAD = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def own(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server that may be left in any state."""
    with running(files, tmp_path_factory.mktemp("own"), max_choices=8, admin_key=KEY) as server:
        exports = server.server.deps.exports
        assert exports is not None
        exports.niceness = 0  # on a busy machine nice processes take minutes
        for name in ("a", "b"):
            httpx.post(
                f"{server.url}/adapters", json={"name": name, "src": name}, headers=HEAD
            ).raise_for_status()
        yield server


def description(server: Running) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/openapi.json").json()
    return found


def test_requests_made_from_the_description_get_what_it_says(own: Running) -> None:
    """No 5xx, no status, header or content type that isn't described, no other form, no hang."""
    known = Known((BASE, "a", "b"), ("a", "b"), KEY, other_keys(own.url, KEY))
    found = fuzz(own.url, known, EXAMPLES, SEED)
    assert len(found) == len(OPERATIONS)
    assert {label: held.wrong for label, held in found.items() if held.wrong} == {}
    own.wait_until_idle()
    own.check_integrity()


def test_every_operation_is_asked_and_answers_as_described(own: Running) -> None:
    """With requests that succeed, which generated ones seldom do."""
    schema = schemathesis.openapi.from_url(f"{own.url}/openapi.json")
    asked: set[tuple[str, str]] = set()

    def ask(
        method: str, template: str, body: Any = None, form: Any = None, query: str = "", **names: str
    ) -> Any:
        path = template.format(**names) + query
        content = {"json": body} if form is None else {"data": form, "files": {"file": LINE}}
        request = httpx.Request(method, own.url + path, headers=HEAD, **content)
        request.read()
        with httpx.Client(timeout=30) as client:
            response = client.send(request)
        assert response.status_code < 300, response.text
        case = schema[template][method].Case(
            path_parameters=dict(names),
            **({} if body is None else {"body": body, "media_type": "application/json"}),
        )
        case.validate_response(response, checks=CHECKS)
        asked.add((method.lower(), template))
        return response.json() if response.headers["content-type"] == "application/json" else response.text

    for path in ("/health", "/ready", "/metrics", "/v1/models", "/adapters", "/exports"):
        ask("GET", path)
    for logprobs, stream in ((False, False), (True, False), (False, True)):
        more = {"logprobs": logprobs, **({"top_logprobs": 2} if logprobs else {})}
        ask("POST", "/v1/chat/completions", {**CHAT, "n": 2, "stream": stream, **more})
        ask("POST", "/v1/completions", {**COMPLETION, "stream": stream, "logprobs": 2 if logprobs else None})
    for stream in (False, True):
        ask("POST", "/v1/chat/completions", {**CHAT, "model": "a:0.5+b", "stream": stream})
        ask("POST", "/v1/completions", {**COMPLETION, "model": BASE, "adapters": PARTS, "stream": stream})
    for stream in (False, True):
        ask(
            "POST",
            "/v1/responses",
            {"model": "a:0.5+b", "input": "x", "max_output_tokens": 2, "stream": stream},
        )
        ask("POST", "/v1/messages", {**CHAT, "model": "a:0.5+b", "stream": stream})
    ask("POST", "/v1/messages/count_tokens", CHAT)
    for encoding in ("float", "base64"):
        ask("POST", "/v1/embeddings", {"model": "a:0.5+b", "input": ["x", "yz"], "encoding_format": encoding})
    for path in ("/score", "/v1/score"):
        ask("POST", path, {"model": "a", "text_1": "x", "text_2": ["yz", "x"]})
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        ask("POST", path, {"model": BASE, "query": "x", "documents": ["yz", {"text": "x"}], "top_n": 1})
    ask("GET", "/v1/models/{model}", model="a:0.5+b")
    ask("GET", "/v1/models/{model}", model="a")
    ask("GET", "/v1/models/{model}", model=BASE)
    ask("POST", "/tokenize", {"prompt": "x", "return_token_strs": True})
    ask("POST", "/detokenize", {"tokens": [5]})
    ask("POST", "/adapters", {"name": "new", "src": "b"})
    ask("POST", "/adapters", {"name": "new", "src": "b"})
    ask("GET", "/adapters/{name}", name="new")
    ask("PATCH", "/adapters/{name}", {"description": "Of words.", "examples": ["a word"]}, name="new")
    ask("PUT", "/adapters/{name}", {"src": "c"}, name="new")
    ask_of_a_failure(own, ask)
    ask("DELETE", "/adapters/{name}", name="coming")
    ask("PUT", "/adapters/{name}", {"src": "c"}, query="?wait=false", name="new")
    ask_of_versions(ask, "new")
    for _ in range(2):
        ask(
            "POST",
            "/adapters",
            {"name": "mixed", "mixture": [{"adapter": "a"}, {"adapter": "b", "weight": -1}]},
        )
    file = ask("POST", "/v1/files", form={"purpose": "batch"})["id"]
    of_batch = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = ask("POST", "/v1/batches", of_batch)["id"]
    own.wait_until(
        "over", lambda: ask("GET", "/v1/batches/{batch_id}", batch_id=batch)["status"] == "completed"
    )
    for path in ("/v1/files", "/v1/batches"):
        ask("GET", path)
    ask("GET", "/v1/files/{file_id}", file_id=file)
    ask("GET", "/v1/files/{file_id}/content", file_id=file)
    ask("DELETE", "/v1/files/{file_id}", file_id=file)
    with own.held():
        file = ask("POST", "/v1/files", form={"purpose": "batch"})["id"]
        batch = ask("POST", "/v1/batches", {**of_batch, "input_file_id": file})["id"]
        ask("POST", "/v1/batches/{batch_id}/cancel", batch_id=batch)
    for path in ("/v1/models", "/adapters"):
        ask("GET", path)
    ask("PUT", "/adapters/{name}", {"mixture": [{"adapter": "a"}]}, name="mixed")
    ask("GET", "/adapters/{name}", name="mixed")
    ask("DELETE", "/adapters/{name}", name="mixed")
    job = ask("POST", "/adapters/{name}/export", {"format": "peft"}, name="new")["id"]
    own.wait_until(
        "exported", lambda: is_over(ask("GET", "/adapters/{name}/export/{job}", name="new", job=job))
    )
    key = ask("POST", "/admin/keys", {"tenant": "acme"})["id"]
    ask("GET", "/admin/keys")
    ask("GET", "/admin/keys/{key}", key=key)
    ask("PATCH", "/admin/keys/{key}", {"parallel": 4, "unlimited": ["budget"]}, key=key)
    ask("POST", "/admin/keys/{key}/rotate", {}, key=key)
    ask("DELETE", "/admin/keys/{key}", key=key)
    ask("GET", "/exports")
    ask("GET", "/adapters/{name}/export/{job}/download", name="new", job=job)
    ask("DELETE", "/adapters/{name}/export/{job}", name="new", job=job)
    ask("DELETE", "/adapters/{name}", name="new")
    job = ask("POST", "/exports", {"model": "a:0.5+b", "format": "peft"})["id"]
    own.wait_until("exported", lambda: is_over(ask("GET", "/exports/{job}", job=job)))
    ask("GET", "/exports/{job}/download", job=job)
    ask("DELETE", "/exports/{job}", job=job)
    ask("POST", "/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "b"})
    ask("POST", "/v1/unload_lora_adapter", {"lora_name": "new"})
    assert asked == set(OPERATIONS)


def ask_of_versions(ask: Callable[..., Any], name: str) -> None:
    """Go back, and try, promote, end and forget versions of an adapter of whose second one there is no more to see."""
    ask("GET", "/adapters/{name}/versions", name=name)
    ask("POST", "/adapters/{name}/rollback", {}, name=name)
    for share in (0.5, 1):
        ask("POST", "/adapters/{name}/canary", {"src": "a", "share": share}, name=name)
    ask("POST", "/adapters/{name}/canary/promote", name=name)
    ask("POST", "/adapters/{name}/canary", {"version": 1, "share": 1}, name=name)
    ask("DELETE", "/adapters/{name}/canary", name=name)
    ask("DELETE", "/adapters/{name}/versions/{version}", name=name, version="2")


def test_what_a_limited_key_gets_is_described(own: Running) -> None:
    """Who manages a namespace is limited where it changes something: on admin routes too."""
    schema = schemathesis.openapi.from_url(f"{own.url}/openapi.json")
    terms = {"tenant": "acme", "rights": ["infer", "manage"], "requests_per_minute": 1}
    key = httpx.post(f"{own.url}/admin/keys", json=terms, headers=HEAD).json()["key"]
    asked: Any = (
        ("POST", "/v1/chat/completions", CHAT),
        ("POST", "/adapters", {"name": "acme/x", "src": "x"}),
    )
    for method, template, body in (*asked, *asked):
        with httpx.Client(timeout=30) as client:
            response = client.request(
                method, own.url + template, json=body, headers={"authorization": f"Bearer {key}"}
            )
        schema[template][method].Case(body=body, media_type="application/json").validate_response(
            response, checks=CHECKS
        )
    assert response.status_code == 429


def ask_of_a_failure(own: Running, ask: Callable[..., Any]) -> None:
    """Begin a registration that fails, and read that."""
    ask("POST", "/adapters", {"name": "coming", "src": "nowhere"}, query="?wait=false")
    own.wait_until("failed", lambda: "failed" in str(ask("GET", "/adapters/{name}", name="coming")))
    assert "failed" in str(ask("GET", "/adapters"))


def is_over(job: dict[str, Any]) -> bool:
    assert job["status"] != "failed", job
    return bool(job["status"] == "succeeded")


@pytest.mark.parametrize(
    ("path", "body", "chunk"),
    [("/v1/chat/completions", CHAT, ChatCompletionChunk), ("/v1/completions", COMPLETION, CompletionChunk)],
)
def test_events_are_what_the_description_says(
    http: httpx.Client, path: str, body: dict[str, object], chunk: type[ChatCompletionChunk | CompletionChunk]
) -> None:
    for model in ("a", "a:0.5+b"):
        asked = {**body, "model": model, "stream": True, "stream_options": {"include_usage": True}}
        text = http.post(path, json=asked).text
        *events, done = [line.removeprefix("data: ") for line in text.splitlines() if line]
        assert done == "[DONE]"
        for event in events:
            chunk.model_validate_json(event, strict=True)
    described = http.get("/openapi.json").json()["paths"][path]["post"]["responses"]["200"]["content"]
    end, data = described["text/event-stream"]["itemSchema"]["properties"]["data"]["anyOf"]
    assert end == {"const": "[DONE]"}
    assert data["contentSchema"]["anyOf"][0]["$ref"].endswith(f"/{chunk.__name__}")


def test_what_tells_a_mixtures_parts_is_described(own: Running) -> None:
    described = description(own)
    for path in ("/v1/chat/completions", "/v1/completions"):
        headers = described["paths"][path]["post"]["responses"]["200"]["headers"]
        told = {"x-manylora-adapters", "x-manylora-adapter", "x-manylora-auto"}
        assert set(headers) == {"x-request-id", *told}
    chat = described["components"]["schemas"]["ChatCompletion"]
    assert "adapters" in chat["properties"]
    assert "adapters" not in chat["required"]
    assert {"choices", "usage", "model"} <= set(chat["required"])


def test_errors_and_nothing_else_have_the_envelope(own: Running) -> None:
    for path, operations in description(own)["paths"].items():
        for method, operation in operations.items():
            assert "422" not in operation["responses"], path
            for status, response in operation["responses"].items():
                told = json.dumps(response["content"].get("application/json"))
                assert ("ErrorAnswer" in told) == (int(status) >= 400), (method, path, status)
    ErrorAnswer.model_validate(httpx.get(f"{own.url}/nothing").json(), strict=True)


def test_the_keys_that_open_a_route_are_told(server: Running, files: Files, tmp_path: Path) -> None:
    def doors(asked: Running) -> tuple[object, ...]:
        paths = description(asked)["paths"]
        return tuple(paths[path]["get"]["security"] for path in ("/health", "/v1/models", "/adapters"))

    assert doors(server) == ([], [{}, {"apiKey": []}], [{}, {"adminKey": []}])
    with running(files, tmp_path, api_key="k", admin_key="boss") as closed:
        assert doors(closed) == ([], [{"apiKey": []}, {"adminKey": []}], [{"adminKey": []}])
        schemes = description(closed)["components"]["securitySchemes"]
        assert {name: (each["type"], each["scheme"]) for name, each in schemes.items()} == {
            "apiKey": ("http", "bearer"),
            "adminKey": ("http", "bearer"),
        }


# The page


def test_the_page_asks_nobody_else_for_anything(http: httpx.Client) -> None:
    page = http.get("/docs")
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert (policy["default-src"], policy["script-src"]) == ("'none'", "'self'")
    assert (policy["connect-src"], policy["frame-ancestors"]) == ("'self'", "'none'")
    assert "//" not in page.text
    found = re.findall(r'(?:src|href)="(docs/[^"]+)"', page.text)
    kinds = {http.get(f"/{path}").headers["content-type"].split(";")[0] for path in found}
    assert kinds == {"text/javascript", "text/css"}
    assert http.get("/docs/start.js").text.startswith("SwaggerUIBundle(")
    assert len(http.get("/docs/swagger-ui-bundle.js").content) > 500_000
    assert http.get("/redoc").status_code == 404
