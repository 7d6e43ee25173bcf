"""A request whose adapter changes between the look-up of its name and the queue: served by the new one, or 404."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from manylora.adapters.mixtures import MixturePart
from tests.server.api.running import SECONDS, Running, running, write_files

PROMPT = "a prompt that is being tokenised"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("door")
    with running(write_files(root), root / "data", keep_versions=0) as found:
        yield found


@pytest.fixture
def admin(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=SECONDS) as client:
        yield client


@contextmanager
def first_prompt_held(server: Running) -> Iterator[threading.Event]:
    """Hold the next prompt in the tokenizer until the block ends; the event says that it is there."""
    reached, go_on = threading.Event(), threading.Event()
    tokenizer = server.server.deps.tokenizer
    encode = tokenizer.encode

    def wait(*arguments: object, **named: object) -> list[int]:
        if not reached.is_set():
            reached.set()
            go_on.wait(SECONDS)
        return encode(*arguments, **named)  # type: ignore[arg-type]  # what the route gave

    tokenizer.encode = wait  # type: ignore[method-assign]
    try:
        yield reached
    finally:
        go_on.set()
        del tokenizer.encode


def ask(server: Running, model: str) -> str:
    client = server.client()
    return client.completions.create(model=model, prompt=PROMPT, max_tokens=8, temperature=0).choices[0].text


def test_a_request_that_meets_a_replacement_gets_the_new_version(
    server: Running, admin: httpx.Client
) -> None:
    for name, source in (("moving", "a"), ("new", "b")):
        assert admin.post("/adapters", json={"name": name, "src": source}).status_code == 201
    old, new = ask(server, "moving"), ask(server, "new")
    assert old != new
    with ThreadPoolExecutor(1) as pool:
        with first_prompt_held(server) as reached:
            answer = pool.submit(ask, server, "moving")
            assert reached.wait(SECONDS)
            assert admin.put("/adapters/moving", json={"src": "b"}).status_code == 200
            server.wait_until(
                "rid of the old version", lambda: len(server.server.engine.snapshot().resident) <= 1
            )
        assert answer.result(SECONDS) == new


def test_while_the_old_version_is_kept_it_gets_that_one(tmp_path: Path) -> None:
    """What it meant when it came is there; the answer says which version it is."""
    files = write_files(tmp_path)
    with (
        running(files, tmp_path / "data", keep_versions=1) as server,
        httpx.Client(base_url=server.url, timeout=SECONDS) as admin,
        ThreadPoolExecutor(1) as pool,
    ):
        admin.post("/adapters", json={"name": "moving", "src": "a"}).raise_for_status()
        old = ask(server, "moving")
        with first_prompt_held(server) as reached:
            body = {"model": "moving", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
            answer = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=SECONDS)
            assert reached.wait(SECONDS)
            admin.put("/adapters/moving", json={"src": "b"}).raise_for_status()
        found = answer.result(SECONDS)
        assert found.headers["x-manylora-adapter"] == "moving@1"
        assert found.json()["choices"][0]["text"] == old != ask(server, "moving")


def test_a_mixture_whose_part_is_replaced_begins_again_with_the_new_one(
    server: Running, admin: httpx.Client
) -> None:
    for name, source in (("still", "c"), ("turning", "a"), ("turned", "b")):
        assert admin.post("/adapters", json={"name": name, "src": source}).status_code == 201
    old, new = ask(server, "still:0.5+turning:2"), ask(server, "still:0.5+turned:2")
    assert old != new
    turning = server.on_loop(lambda: server.server.catalog.get("turning")).record.id
    with ThreadPoolExecutor(1) as pool:
        with first_prompt_held(server) as reached:
            answer = pool.submit(ask, server, "still:0.5+turning:2")
            assert reached.wait(SECONDS)
            assert admin.put("/adapters/turning", json={"src": "b"}).status_code == 200
            server.wait_until(
                "rid of the old version", lambda: turning not in server.server.engine.snapshot().resident
            )
        assert answer.result(SECONDS) == new


def test_a_mixture_whose_part_is_deleted_gets_a_404_that_names_the_part(
    server: Running, admin: httpx.Client
) -> None:
    for name in ("stays", "goes"):
        assert admin.post("/adapters", json={"name": name, "src": "c"}).status_code == 201
    with ThreadPoolExecutor(1) as pool:
        with first_prompt_held(server) as reached:
            answer = pool.submit(ask, server, "stays:0.5+goes")
            assert reached.wait(SECONDS)
            assert admin.delete("/adapters/goes").status_code == 200
        with pytest.raises(openai.NotFoundError, match="part 'goes' does not exist"):
            answer.result(SECONDS)


def ask_chat(server: Running, model: str) -> tuple[str, int]:
    """The answer's text and the prompt's length."""
    messages = [{"role": "user", "content": PROMPT}]
    body = {"model": model, "messages": messages, "max_tokens": 8, "temperature": 0}
    answer = (
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=SECONDS).raise_for_status().json()
    )
    return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]


def test_template_and_weights_are_of_one_version(server: Running, admin: httpx.Client) -> None:
    for name, source in (("shifting", "templated"), ("untemplated", "c")):
        assert admin.post("/adapters", json={"name": name, "src": source}).status_code == 201
    old, new = ask_chat(server, "shifting"), ask_chat(server, "untemplated")
    assert old[1] != new[1], "the templates must differ to prove anything"
    with ThreadPoolExecutor(1) as pool:
        with first_prompt_held(server) as reached:
            answer = pool.submit(ask_chat, server, "shifting")
            assert reached.wait(SECONDS)
            assert admin.put("/adapters/shifting", json={"src": "c"}).status_code == 200
        assert answer.result(SECONDS) == new


def test_a_request_that_meets_a_delete_gets_a_404_with_the_names(
    server: Running, admin: httpx.Client
) -> None:
    for name in ("leaving", "staying"):
        assert admin.post("/adapters", json={"name": name, "src": "c"}).status_code == 201
    with ThreadPoolExecutor(1) as pool:
        with first_prompt_held(server) as reached:
            answer = pool.submit(ask, server, "leaving")
            assert reached.wait(SECONDS)
            assert admin.delete("/adapters/leaving").status_code == 200
        with pytest.raises(openai.NotFoundError, match="staying"):
            answer.result(SECONDS)


def test_a_client_that_loses_the_race_again_and_again_is_served_in_the_end(
    server: Running, admin: httpx.Client, tmp_path: Path
) -> None:
    """Each replacement makes the request begin again; the last one serves it."""
    assert admin.post("/adapters", json={"name": "restless", "src": "a"}).status_code == 201
    catalog = server.server.catalog
    resolve, left = catalog.resolve, ["b", "c", "a"]

    def resolve_and_lose(model: str, *parts: Sequence[MixturePart], asker: str | None = None) -> object:
        found = resolve(model, *parts, asker=asker)
        if model == "restless" and left:
            losing.append(left.pop())
        return found

    losing: list[str] = []
    tokenizer = server.server.deps.tokenizer
    encode = tokenizer.encode

    def replace_first(*arguments: object, **named: object) -> list[int]:
        while losing:
            source = losing.pop()
            assert admin.put("/adapters/restless", json={"src": source}).status_code == 200
        return encode(*arguments, **named)  # type: ignore[arg-type]  # what the route gave

    catalog.resolve, tokenizer.encode = resolve_and_lose, replace_first  # type: ignore[method-assign,assignment]
    try:
        assert ask(server, "restless")
    finally:
        del catalog.resolve, tokenizer.encode
