"""The demo as a newcomer meets it: started without arguments, served in 4 bits, asked through HTTP."""

import contextlib
import json
import resource
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from manylora.demo.forms import plain
from manylora.demo.heldout import held_out_prompts
from tests.serving import Served, serving

HELD_OUT = Path(__file__).resolve().parent.parent / "demo" / "heldout.jsonl"
STREAMS = 16
FEW_FILES = 1024


class Row(TypedDict):
    """A line of heldout.jsonl."""

    adapter: str
    messages: list[ChatCompletionMessageParam]
    expected: str


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FEW_FILES, hard))  # as many systems have it
    try:
        with serving(tmp_path_factory.mktemp("demo")) as served:
            yield served
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return [json.loads(line) for line in HELD_OUT.read_text().splitlines()]


def client_of(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def base_of(server: Served) -> str:
    return client_of(server).models.list().data[0].id


def ask_all(server: Served, rows: list[Row], model: str | None = None) -> list[str]:
    """The answers to every held-out prompt, all adapters mixed; ``model`` answers in their place if given."""
    client = client_of(server)

    def ask(row: Row) -> str:
        answer = client.chat.completions.create(
            model=model or row["adapter"], messages=row["messages"], temperature=0, max_tokens=64
        )
        return answer.choices[0].message.content or ""

    with ThreadPoolExecutor(STREAMS) as pool:
        return list(pool.map(ask, rows))


def shares_right(rows: list[Row], answers: list[str]) -> dict[str, float]:
    """The share of exact answers by adapter."""
    shares = {}
    for adapter in sorted({row["adapter"] for row in rows}):
        own = [
            answer == row["expected"]
            for answer, row in zip(answers, rows, strict=True)
            if row["adapter"] == adapter
        ]
        shares[adapter] = sum(own) / len(own)
    return shares


def test_each_adapter_does_its_task(server: Served, rows: list[Row]) -> None:
    shares = shares_right(rows, ask_all(server, rows))
    assert len(shares) >= 3
    assert min(shares.values()) >= 0.95, shares


def test_the_base_does_none_of_them_but_answers_in_plain_english(server: Served, rows: list[Row]) -> None:
    answers = ask_all(server, rows, base_of(server))
    shares = shares_right(rows, answers)
    assert max(shares.values()) <= 0.05, shares
    sentences = [plain(prompt.question) for prompt in held_out_prompts()]
    right = [answer == sentence for answer, sentence in zip(answers, sentences, strict=True)]
    assert sum(right) / len(right) >= 0.95


def test_models_lists_the_base_and_its_adapters(server: Served, rows: list[Row]) -> None:
    models = client_of(server).models.list().data
    assert {model.id for model in models[1:]} == {row["adapter"] for row in rows} | {"tools", "auto"}
    assert {model.model_extra["parent"] for model in models[1:] if model.model_extra} == {models[0].id}


def test_the_base_is_held_in_four_bits(server: Served) -> None:
    assert "nf4" in server.log.read_text().lower()


def test_silent_connections_exhaust_nothing(server: Served) -> None:
    """More than the soft limit of open files, which the server raises when it starts."""
    host, port = server.url.removeprefix("http://").split(":")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * FEW_FILES), hard))
    with contextlib.ExitStack() as stack:
        for _ in range(FEW_FILES + 100):
            stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
        assert httpx.get(f"{server.url}/health", timeout=30).status_code == 200
