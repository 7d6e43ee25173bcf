"""Adapters' chat templates at the door: a bomb is a 400 that nobody else feels; no program, no registration."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.server.api.running import BASE, SECONDS, Files, Running, asked, running, write_files

BOMB = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
THINKING = (
    "{{ messages[0].content }}{% if enable_thinking is defined and not enable_thinking %} OFF{% endif %}"
)
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def own_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    files = write_files(tmp_path_factory.mktemp("checkpoints"))
    for name, template in (("bomb", BOMB), ("thinking", THINKING), ("broken", "{% for %}")):
        shutil.copytree(files.adapters / "templated", files.adapters / name)
        (files.adapters / name / "chat_template.jinja").write_text(template)
    return files


@pytest.fixture(scope="module")
def own(own_files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(own_files, tmp_path_factory.mktemp("data"), template_timeout=2.0) as server:
        yield server


@pytest.fixture
def admin(own: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=own.url, timeout=SECONDS) as client:
        yield client


def register(admin: httpx.Client, name: str, source: str | None = None) -> httpx.Response:
    return admin.post("/adapters", json={"name": name, "src": source or name})


def chat(admin: httpx.Client, model: str, **more: object) -> httpx.Response:
    return admin.post(
        "/v1/chat/completions", json={"model": model, "messages": MESSAGES, "max_tokens": 2, **more}
    )


def rendered(admin: httpx.Client, model: str, **more: object) -> str:
    tokens = admin.post("/tokenize", json={"model": model, "messages": MESSAGES, **more})
    assert tokens.status_code == 200, tokens.text
    text: str = admin.post("/detokenize", json={"tokens": tokens.json()["tokens"]}).json()["prompt"]
    return text


def test_a_bomb_is_a_400_that_nobody_else_feels(own: Running, admin: httpx.Client) -> None:
    for name, source in (("bomb", "bomb"), ("other", "templated"), ("leaving", "thinking")):
        assert register(admin, name, source).status_code == 201
    refused = chat(admin, "bomb")
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "messages"
    assert "longer than 2 s" in refused.json()["error"]["message"]
    templates = own.server.deps.texts.templates
    body: dict[str, object] = {"model": "bomb", "messages": MESSAGES}
    with ExitStack() as clients:
        # More than there are threads that tokenise for everybody.
        for _ in range(12):
            clients.enter_context(asked(own, body, "/v1/chat/completions"))
        own.wait_until("burning", lambda: templates.waiting >= 10)
        for _ in range(8):
            assert chat(admin, BASE).status_code == 200
            assert chat(admin, "other").status_code == 200
        assert admin.get("/health").status_code == 200
        assert admin.delete("/adapters/leaving").status_code == 200
        assert admin.delete("/adapters/bomb").status_code == 200
        assert templates.waiting > 0
    # Nobody waits any more: what had not begun never will.
    own.wait_until("rid of them", lambda: templates.waiting == 0)
    assert chat(admin, "other").status_code == 200


def test_what_is_no_program_is_refused_at_registration(admin: httpx.Client) -> None:
    refused = register(admin, "broken")
    assert refused.status_code == 400
    assert "chat template can't be compiled" in refused.json()["error"]["message"]
    assert admin.get("/adapters/broken").status_code == 404


def test_what_the_client_says_to_the_template_reaches_it(admin: httpx.Client) -> None:
    assert register(admin, "thinking").status_code in (200, 201)
    assert rendered(admin, "thinking") == "hello"
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    assert rendered(admin, "thinking", **off) == "hello OFF"
    assert (
        chat(admin, "thinking", **off).json()["usage"]["prompt_tokens"]
        > (chat(admin, "thinking").json()["usage"]["prompt_tokens"])
    )
    assert rendered(admin, BASE, **off) == rendered(admin, BASE)


@pytest.mark.parametrize(
    ("variables", "field"),
    [
        ({"messages": []}, "messages"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"tools": []}, "tools"),
        ({"bos_token": "x"}, "bos_token"),
        ({"no name": 1}, "no name"),
        ({"long": "x" * 70_000}, None),
        ([1], None),
        ("enable_thinking", None),
    ],
)
def test_what_a_client_may_not_say_is_refused_by_name(
    admin: httpx.Client, variables: object, field: str | None
) -> None:
    for route in ("/v1/chat/completions", "/tokenize"):
        body = {"model": BASE, "messages": MESSAGES, "chat_template_kwargs": variables}
        refused = admin.post(route, json=body)
        assert refused.status_code == 400, refused.text
        name = "chat_template_kwargs" if field is None else f"chat_template_kwargs.{field}"
        assert refused.json()["error"]["param"] == name


def test_deeply_nested_words_for_the_template_are_no_fault_of_ours(admin: httpx.Client) -> None:
    deep: object = 1
    for _ in range(400):
        deep = [deep]
    body = {"model": BASE, "messages": MESSAGES, "max_tokens": 1, "chat_template_kwargs": {"x": deep}}
    assert admin.post("/v1/chat/completions", content=json.dumps(body)).status_code in (200, 400)


def test_a_template_is_checked_again_when_it_is_replaced(admin: httpx.Client, own_files: Files) -> None:
    assert register(admin, "changing", "templated").status_code == 201
    refused = admin.put("/adapters/changing", json={"src": "broken"})
    assert refused.status_code == 400
    assert rendered(admin, "changing") == "hello END"


def test_no_worker_is_left(own_files: Files, tmp_path: Path) -> None:
    with running(own_files, tmp_path, template_timeout=2.0) as server:
        with httpx.Client(base_url=server.url, timeout=SECONDS) as admin:
            assert register(admin, "thinking").status_code == 201
        pids = server.server.deps.texts.templates.pids
        assert pids
    for pid in pids:
        server.wait_until("gone", lambda pid=pid: not Path(f"/proc/{pid}").exists())  # type: ignore[misc]
