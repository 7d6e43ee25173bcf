"""Requests that are left in the middle of their prompt or answer leave no prefix that is only partly computed.

Prompts are cut into chunks of a few tokens, share beginnings, and are asked again after each hang-up: every answer
must be, token for token and bit for bit, that of a server which nobody left and which computes prompts whole.
"""

import itertools
import json
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from manylora.loadtest.material.checkpoints import TINY
from tests.server.api.running import BASE, SECONDS, Files, Running, running

CHUNK = 16
LONGEST = 400
MODELS = (BASE, "a")
Answer = tuple[list[str], list[float]]


@pytest.fixture(scope="module")
def chunked(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose prompts take a step for every 16 tokens, in blocks of 4."""
    directory = tmp_path_factory.mktemp("chunked")
    with running(files, directory, max_step_tokens=CHUNK, block_size=4, kv_cache_gib=0.003) as server:
        httpx.post(f"{server.url}/adapters", json={"name": "a", "src": "a"}).raise_for_status()
        yield server


def prompts() -> list[list[int]]:
    """Prompts of which each shares a beginning with others, up to all of it."""
    rng = random.Random(5)
    stem = [rng.randrange(TINY.vocab_size - 3) for _ in range(LONGEST)]
    made = []
    for length in (LONGEST, 3, 4, 5, 16, 17, 63, 64, 65, 200, 201, 399):
        made += [stem[:length], [*stem[:length], 7, 8, 9]]
    return made


def body(model: str, prompt: list[int], max_tokens: int, *, stream: bool) -> dict[str, object]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
        "stream": stream,
    }


def ask(server: Running, model: str, prompt: list[int]) -> Answer:
    response = httpx.post(
        f"{server.url}/v1/completions", json=body(model, prompt, 6, stream=False), timeout=60
    )
    response.raise_for_status()
    found = response.json()["choices"][0]["logprobs"]
    return found["tokens"], found["token_logprobs"]


@contextmanager
def held_at(server: Running, step: int) -> Iterator[threading.Event]:
    """Hold the engine in its ``step``-th step from now until the block ends; the event says that it is there."""
    launch, taken = server.server.base.decoder.launch, itertools.count(1)
    there, go_on = threading.Event(), threading.Event()

    def wait(*arguments: Any) -> Any:
        if next(taken) == step:
            there.set()
            go_on.wait(SECONDS)
        return launch(*arguments)

    server.server.base.decoder.launch = wait  # type: ignore[method-assign,assignment]
    try:
        yield there
    finally:
        del server.server.base.decoder.launch
        go_on.set()


def leave(server: Running, model: str, prompt: list[int], step: int, *, stream: bool) -> None:
    """Ask, and hang up while the engine is in the ``step``-th step of the request."""
    raw = json.dumps(body(model, prompt, 200, stream=stream)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(raw)}\r\n\r\n".encode()
    with held_at(server, step) as there:
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head + raw)
            assert there.wait(SECONDS)
        for _ in range(5):  # the loop hears of the hang-up before it hears of these
            httpx.get(f"{server.url}/health")


@pytest.fixture(scope="module")
def undisturbed(files: Files, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Answer]:
    """What each prompt is answered where nothing is cut and nobody left: on a server of its own."""
    found = {}
    with running(files, tmp_path_factory.mktemp("alone")) as server:
        httpx.post(f"{server.url}/adapters", json={"name": "a", "src": "a"}).raise_for_status()
        for number, prompt in enumerate(prompts()):
            for model in MODELS:
                found[model, number] = ask(server, model, prompt)
    return found


def forget(server: Running) -> None:
    """Push everything that is cached out: a request over more blocks than any other leaves idle."""
    rng = random.Random(6)
    for _ in range(3):
        ask(server, BASE, [rng.randrange(TINY.vocab_size - 3) for _ in range(1000)])


@pytest.mark.parametrize("seed", range(2))
def test_who_asks_after_a_hang_up_gets_what_an_undisturbed_server_says(
    chunked: Running, undisturbed: dict[tuple[str, int], Answer], seed: int
) -> None:
    rng, made = random.Random(seed), prompts()
    forget(chunked)
    for _ in range(15):
        model, number = rng.choice(MODELS), rng.randrange(len(made))
        leave(chunked, model, made[number], rng.randint(1, LONGEST // CHUNK + 8), stream=rng.random() < 0.5)
        again = rng.choice((number, rng.randrange(len(made))))
        for asked in (number, again):
            assert ask(chunked, model, made[asked]) == undisturbed[model, asked], (model, asked)
    assert (chunked.metric("manylora_prefix_cache_hit_tokens_total") or 0) > 0
    chunked.wait_until_idle()
    chunked.check_integrity()
