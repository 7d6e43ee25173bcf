"""Files of adapters with odd JSON in every place: refused with 400 or served, never a fault of the server's."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from manylora.loadtest.material.checkpoints import AdapterShape, write_adapter
from tests.server.api.running import Files

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FIELDS = [
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "layers_to_transform",
    "layers_pattern",
    "base_model_name_or_path",
    "init_lora_weights",
    "bias",
    "lora_dropout",
    "use_dora",
    "alora_invocation_tokens",
    "invocation_string",
    "unheard_of",
]
ODD = {
    "null": "null",
    "true": "true",
    "0": "0",
    "-1": "-1",
    "401 digits": "1" + "0" * 400,
    "5000 digits": "9" * 5000,
    "over 64 bits": str(2**64),
    "1e400": "1e400",
    "-1e400": "-1e400",
    "NaN": "NaN",
    "1e308": "1e308",
    "empty text": '""',
    "half a surrogate": '"\\ud800"',
    "a surrogate key": '{"\\udfff": 1}',
    "surrogates in a list": '["q_proj", "\\uDC00"]',
    "a long text": '"' + "x" * 100_000 + '"',
    "a text of no characters": '"\\u0000"',
    "a list of lists": "[[[]]]",
    "an object": '{"a": {"b": [1, "x", null]}}',
    "odd numbers in an object": '{"q_proj": 1e400, "v_proj": ' + "9" * 401 + "}",
    "deep": "[" * 100_000 + "]" * 100_000,
    "deep, but parsed": "[" * 400 + "]" * 400,
    "many keys": "{" + ",".join(f'"k{i}": 1' for i in range(2000)) + "}",
}


@pytest.fixture
def odd(files: Files, http: httpx.Client) -> Iterator[Path]:
    path = files.adapters / "odd"
    yield write_adapter(path, files.base, AdapterShape(rank=4, seed=9))
    shutil.rmtree(path)
    for adapter in http.get("/adapters").json()["data"]:
        if adapter["name"] not in ("a", "b", "c"):
            http.delete(f"/adapters/{adapter['name']}").raise_for_status()


def register(http: httpx.Client, case: str) -> int:
    """Register and, if it was accepted, use and delete the adapter; return the registration's status."""
    answer = http.post("/adapters", json={"name": "odd", "src": "odd"})
    assert answer.status_code in (201, 400), (case, answer.text)
    assert len(answer.content) < 10_000, case
    if answer.status_code == 201:
        chat = {"model": "odd", "messages": [{"role": "user", "content": "x"}]}
        assert http.post("/tokenize", json=chat).status_code in (200, 400), case
        assert http.get("/adapters/odd").status_code == 200, case
        http.delete("/adapters/odd").raise_for_status()
    else:
        assert answer.json()["error"]["message"], case
    return answer.status_code


@pytest.mark.parametrize("field", FIELDS)
def test_odd_values_in_a_config(http: httpx.Client, odd: Path, field: str) -> None:
    config = json.loads((odd / CONFIG).read_text())
    for name, value in ODD.items():
        rest = json.dumps({key: item for key, item in config.items() if key != field})
        (odd / CONFIG).write_text(f'{rest[:-1]}, "{field}": {value}}}')
        register(http, f"{field}: {name}")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_alpha", ODD["401 digits"]),
        ("r", ODD["401 digits"]),
        ("target_modules", ODD["half a surrogate"]),
        ("base_model_name_or_path", ODD["half a surrogate"]),
        ("lora_alpha", ODD["deep, but parsed"]),
    ],
)
def test_what_no_adapter_means_is_400(http: httpx.Client, odd: Path, field: str, value: str) -> None:
    config = json.loads((odd / CONFIG).read_text())
    rest = json.dumps({key: item for key, item in config.items() if key != field})
    (odd / CONFIG).write_text(f'{rest[:-1]}, "{field}": {value}}}')
    assert register(http, field) == 400


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
@pytest.mark.parametrize("form", ["{}", '{{"chat_template": {}}}', '{{"<x>": {}}}'])
def test_odd_values_beside_it(http: httpx.Client, odd: Path, file: str, form: str) -> None:
    for name, value in ODD.items():
        (odd / file).write_text(form.format(value))
        register(http, f"{file} {form}: {name}")


@pytest.mark.parametrize(
    "templates",
    [
        '[{"name": ["default"], "template": "x"}]',
        '[{"name": {}, "template": "x"}]',
        '[{"name": "default", "template": 3}]',
        '[{"name": "default", "template": "\\ud800"}]',
        '[{"template": "x"}]',
        "[[], null, 3]",
    ],
)
def test_odd_lists_of_templates(http: httpx.Client, odd: Path, templates: str) -> None:
    (odd / "tokenizer_config.json").write_text(f'{{"chat_template": {templates}}}')
    register(http, templates)


def test_odd_headers_of_weights(http: httpx.Client, odd: Path) -> None:
    content = (odd / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    first = next(name for name in header if name != "__metadata__")

    def write(raw: str) -> None:
        encoded = raw.encode()
        (odd / WEIGHTS).write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)

    for name, value in ODD.items():
        entry = json.dumps({**header[first], "shape": 0})
        rest = json.dumps({key: item for key, item in header.items() if key != first})
        for part in (value, entry.replace('"shape": 0', f'"shape": {value}')):
            write(f'{rest[:-1]}, "{first}": {part}}}')
            assert register(http, f"header: {name}") == 400
        for key in ("dtype", "data_offsets", "more"):
            write(f'{rest[:-1]}, "{first}": {{"{key}": {value}}}}}')
            assert register(http, f"header's {key}: {name}") == 400
    write(json.dumps({**header, "\ud800": header[first]}))
    assert register(http, "a tensor's name") == 400


@pytest.mark.parametrize(
    "src",
    [
        "file://[::1",
        "file://[::1]/x",
        "file:///%00",
        "file://a@b:c/x",
        "file:///" + "x" * 5000,
        "x" * 5000,
        "\0",
        "file://ℬ℀/x",
    ],
)
def test_odd_sources_are_400(http: httpx.Client, src: str) -> None:
    refused = http.post("/adapters", json={"name": "odd", "src": src})
    assert refused.status_code in (400, 403), refused.text
