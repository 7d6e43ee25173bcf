"""Odd JSON in every field of every route, odd content types, encodings and paths: an answer, never a 5xx."""

import http.client
import json
from collections.abc import Iterator

import httpx
import pytest
from pydantic import BaseModel

from manylora.server.api.adapter_schemas import (
    AdapterRequest,
    AdapterUpdate,
    LoadLoraRequest,
    UnloadLoraRequest,
)
from manylora.server.api.export_schemas import ExportRequest, MixtureExportRequest
from manylora.server.api.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from tests.server.api.running import Running

MESSAGES = '[{"role": "user", "content": "x"}]'
ROUTES: dict[str, tuple[str, str, type[BaseModel], dict[str, str]]] = {
    "chat": (
        "POST",
        "/v1/chat/completions",
        ChatRequest,
        {"model": '"a"', "messages": MESSAGES, "max_tokens": "2"},
    ),
    "completions": (
        "POST",
        "/v1/completions",
        CompletionRequest,
        {"model": '"a"', "prompt": '"x"', "max_tokens": "2"},
    ),
    "tokenize": ("POST", "/tokenize", TokenizeRequest, {"prompt": '"x"'}),
    "detokenize": ("POST", "/detokenize", DetokenizeRequest, {"tokens": "[5]"}),
    "register": ("POST", "/adapters", AdapterRequest, {"name": '"a"', "src": '"a"'}),
    "replace": ("PUT", "/adapters/a", AdapterUpdate, {"src": '"a"'}),
    "mix": ("POST", "/adapters", AdapterRequest, {"name": '"mixed"', "mixture": '[{"adapter": "a"}]'}),
    "mix anew": ("PUT", "/adapters/a", AdapterUpdate, {"mixture": '[{"adapter": "a"}]'}),
    "load": ("POST", "/v1/load_lora_adapter", LoadLoraRequest, {"lora_name": '"a"', "lora_path": '"a"'}),
    "unload": ("POST", "/v1/unload_lora_adapter", UnloadLoraRequest, {"lora_name": '"nobody"'}),
    "export": ("POST", "/adapters/nobody/export", ExportRequest, {}),
    "export a mixture": ("POST", "/exports", MixtureExportRequest, {"model": '"nobody"'}),
}
ODD = {
    "false": "false",
    "zero": "0",
    "minus one": "-1",
    "2**31": str(2**31),
    "2**63 - 1": str(2**63 - 1),
    "2**63": str(2**63),
    "2**64": str(2**64),
    "-2**63": str(-(2**63)),
    "400 digits": "9" * 400,
    "minus 400 digits": "-" + "9" * 400,
    "1e400": "1e400",
    "1e308": "1e308",
    "1e-38": "1e-38",
    "5e-324": "5e-324",
    "-0.0": "-0.0",
    "a text": '"x"',
    "no text": '""',
    "NUL": '"\\u0000"',
    "half a surrogate": '"\\uD800"',
    "beyond the first plane": '"\\ud83e\\udd99"',
    "a long text": '"' + "x" * 10_000 + '"',
    "a number as text": '"' + "9" * 400 + '"',
    "no list": "[]",
    "a list of everything": '[null, true, 1, 1.5, "x", [], {}]',
    "large ints": f"[{2**63}, {2**64}, {'9' * 400}]",
    "negative ints": "[-1]",
    "floats": "[1e400, 0.5]",
    "no object": "{}",
    "an object": '{"a": {"b": [1]}}',
    "a large key": '{"' + "9" * 400 + '": 1}',
    "a large number in an object": '{"1": ' + "9" * 400 + "}",
    "deep": "[" * 300 + "]" * 300,
}


@pytest.fixture
def _leave_the_shared_adapters(http: httpx.Client) -> Iterator[None]:
    yield
    for each in http.get("/adapters").json()["data"]:
        if each["name"] not in ("a", "b", "c"):
            http.delete(f"/adapters/{each['name']}").raise_for_status()


@pytest.mark.usefixtures("_leave_the_shared_adapters")
@pytest.mark.parametrize("route", ROUTES)
def test_odd_values_in_every_field(http: httpx.Client, route: str) -> None:
    method, path, model, body = ROUTES[route]
    for field in (*model.model_fields, "unheard_of"):
        for name, value in ODD.items():
            fields = ", ".join(f'"{key}": {item}' for key, item in {**body, field: value}.items())
            answer = http.request(method, path, content=f"{{{fields}}}".encode())
            case = f"{field}: {name}: {answer.status_code}: {answer.text[:300]}"
            assert answer.status_code in (200, 201, 400, 403, 404, 409, 413), case
            if answer.status_code >= 400:
                assert answer.json()["error"]["message"], case
                assert len(answer.content) < 20_000, case


@pytest.mark.parametrize("route", ["chat", "completions"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_the_least_that_a_field_takes_is_served(http: httpx.Client, route: str, field: str) -> None:
    """And what is refused names the field, not the weights."""
    method, path, _, body = ROUTES[route]
    for value in ("1e-320", "1e-38", "1e-6", "0.01", "1e-45"):
        fields = ", ".join(f'"{key}": {item}' for key, item in {**body, field: value}.items())
        answer = http.request(method, path, content=f"{{{fields}}}".encode())
        assert answer.status_code == 200 or answer.json()["error"]["param"] == field, answer.text


def test_a_field_given_twice_counts_once(http: httpx.Client) -> None:
    for body in (b'{"prompt": "x", "prompt": "y"}', b'{"prompt": 3, "prompt": "y"}'):
        assert (
            http.post("/tokenize", content=body).json()["tokens"]
            == (http.post("/tokenize", json={"prompt": "y"}).json()["tokens"])
        )


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/json; charset=utf-16", "multipart/form-data", "é", "a" * 5000]
)
def test_bodies_are_json_whatever_the_content_type_says(http: httpx.Client, kind: str) -> None:
    answer = http.post(
        "/tokenize", content=b'{"prompt": "x"}', headers=[(b"content-type", kind.encode("latin-1"))]
    )
    assert answer.status_code == 200
    form = http.post("/tokenize", content=b"prompt=x", headers=[(b"content-type", kind.encode("latin-1"))])
    assert form.status_code == 400


PATHS = [
    "/%ff",
    "/adapters/%ff%fe",
    "/v1/models/%ed%a0%80",
    "/adapters/%00",
    "/adapters/" + "x" * 5000,
    "/%2e%2e/x",
    "/adapters/",
    "//",
    "/v1//models",
    "/adapters/a%2",
    "/adapters/a/export/export-%30",
    "/exports?adapter=%ff",
]


@pytest.mark.parametrize("path", PATHS)
def test_odd_paths(server: Running, path: str) -> None:
    for method in ("GET", "DELETE", "PUT", "POST", "HEAD", "OPTIONS", "TRACE", "PATCH", "PROPFIND"):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request(method, path, body=b"{}")
        answer = connection.getresponse()
        content = answer.read()
        assert answer.status in (200, 307, 400, 404, 405), (method, answer.status)
        if answer.status >= 400 and method != "HEAD":
            assert json.loads(content)["error"]["message"]
        connection.close()
