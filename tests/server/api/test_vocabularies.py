"""Adapters that change embedding and head on a running server: tokens of their own in prompts, answers and reports."""

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from manylora.loadtest.material.peft_adapters import (
    NEW_TOKENS,
    PeftAdapter,
    token_kinds,
    write_peft_adapter,
)
from tests.server.api.running import BASE, Files, Running, running

KINDS = {kind.name: kind for kind in token_kinds(320)}
FIRST_NEW = 320


@pytest.fixture(scope="module")
def server(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(files, tmp_path_factory.mktemp("data")) as server:
        yield server


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


def registered(server: Running, http: httpx.Client, name: str, kind: PeftAdapter) -> httpx.Response:
    path = server.adapters / name
    if not path.exists():
        write_peft_adapter(path, server.adapters.parent / "base", kind, 4)
    return http.post("/adapters", json={"name": name, "src": name})


@pytest.fixture
def thinker(server: Running, http: httpx.Client) -> str:
    answer = registered(server, http, "thinker", KINDS["added tokens, whole"])
    assert answer.status_code in (200, 201), answer.text
    return "thinker"


def ask(http: httpx.Client, **body: object) -> httpx.Response:
    return http.post("/v1/completions", json={"max_tokens": 8, "temperature": 0, **body})


def test_its_tokens_are_in_its_prompts_and_answers_and_in_nobody_elses(
    http: httpx.Client, thinker: str
) -> None:
    text = f"ab {NEW_TOKENS[1]} cd"
    tokens = http.post("/tokenize", json={"model": thinker, "prompt": text}).json()["tokens"]
    assert FIRST_NEW + 1 in tokens
    other = http.post("/tokenize", json={"model": BASE, "prompt": text}).json()["tokens"]
    assert max(other) < FIRST_NEW
    spelled = http.post("/detokenize", json={"model": thinker, "tokens": tokens})
    assert NEW_TOKENS[1] in spelled.json()["prompt"]
    assert http.post("/detokenize", json={"model": BASE, "tokens": tokens}).status_code == 400

    forced = {str(FIRST_NEW + 2): 100}
    answer = ask(http, model=thinker, prompt=tokens, logit_bias=forced, logprobs=2).json()
    assert answer["usage"]["completion_tokens"] == 8
    assert set(answer["choices"][0]["logprobs"]["tokens"]) == {NEW_TOKENS[2]}
    refused = ask(http, model=BASE, prompt="a", logit_bias=forced)
    assert refused.status_code == 400
    assert "logit_bias" in refused.text
    assert ask(http, model=BASE, prompt=tokens).status_code == 400


def test_log_probabilities_are_over_its_own_ids(http: httpx.Client, thinker: str) -> None:
    prompt = [1, FIRST_NEW, 5, FIRST_NEW + 2, 7]
    answer = ask(http, model=thinker, prompt=prompt, echo=True, logprobs=20, max_tokens=2).json()
    told = answer["choices"][0]["logprobs"]
    assert len(told["token_logprobs"]) == 7
    assert told["token_logprobs"][0] is None
    assert all(each < 0 for each in told["token_logprobs"][1:])
    sampled = ask(http, model=thinker, prompt=prompt, temperature=1, seed=3, n=3, logprobs=1).json()
    assert len(sampled["choices"]) == 3


def test_a_grammar_holds_it_as_it_holds_others(http: httpx.Client, thinker: str) -> None:
    body = {"model": thinker, "prompt": "x", "max_tokens": 12, "temperature": 0, "guided_regex": "[ab]{3}"}
    answer = http.post("/v1/completions", json=body).json()
    text = answer["choices"][0]["text"]
    assert len(text) == 3
    assert set(text) <= set("ab")


def test_others_are_answered_in_its_company_as_alone(
    server: Running, http: httpx.Client, thinker: str
) -> None:
    http.post("/adapters", json={"name": "plain", "src": "a"})
    models = (BASE, "plain", thinker)
    body = {"prompt": ["hello there"] * 3, "max_tokens": 24}
    alone = {model: ask(http, model=model, **body).json()["choices"] for model in models}
    found: dict[str, object] = {}

    def asked(model: str) -> None:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            found[model] = ask(client, model=model, **body).json()["choices"]

    threads = [threading.Thread(target=asked, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == alone


def test_it_is_no_part_of_a_mixture(http: httpx.Client, thinker: str) -> None:
    http.post("/adapters", json={"name": "plain", "src": "a"})
    answer = ask(http, model=f"{thinker}:0.5+plain:0.5", prompt="a")
    assert answer.status_code == 400
    assert "thinker" in answer.text
    assert ask(http, model=f"{thinker}:1", prompt="a").status_code == 200


def test_parts_with_the_bases_vocabulary_are_mixed(server: Running, http: httpx.Client) -> None:
    for name, kind in (("head", "whole head"), ("rows", "trained tokens"), ("both", "factors of both")):
        answer = registered(server, http, name, KINDS[kind])
        assert answer.status_code in (200, 201), answer.text
    assert ask(http, model="head:0.5+rows:0.25+both", prompt="abc").status_code == 200


def test_memory_of_a_deleted_one_comes_back(server: Running, http: httpx.Client) -> None:
    used = server.metric("manylora_vocabulary_bytes", state="used")
    answer = registered(server, http, "heavy", KINDS["both whole"])
    assert answer.status_code in (200, 201)
    assert ask(http, model="heavy", prompt="a").status_code == 200
    assert server.metric("manylora_vocabulary_bytes", state="used") == (used or 0) + (5 << 16)
    gone = http.delete("/adapters/heavy").json()
    assert gone["freed"]["device_bytes"] >= 2 * 320 * 128 * 4
    assert server.metric("manylora_vocabulary_bytes", state="used") == used
    server.check_integrity()


def test_what_there_is_no_room_for_is_refused_with_the_numbers(files: Files, tmp_path: Path) -> None:
    write_peft_adapter(files.adapters / "large", files.base, KINDS["both whole"], 5)
    with running(files, tmp_path / "data", vocabulary_gib=(4 << 16) / (1 << 30)) as server:
        answer = httpx.post(f"{server.url}/adapters", json={"name": "large", "src": "large"}, timeout=30)
        assert answer.status_code == 400
        assert "0.3 MiB for embedding and head" in answer.text
        assert "--vocabulary-gib" in answer.text


def test_a_restart_serves_it_again(files: Files, tmp_path: Path) -> None:
    write_peft_adapter(files.adapters / "again", files.base, KINDS["added tokens, rows"], 6)
    told = []
    for number in range(2):
        with (
            running(files, tmp_path / "data") as server,
            httpx.Client(base_url=server.url, timeout=30) as http,
        ):
            if number == 0:
                assert http.post("/adapters", json={"name": "again", "src": "again"}).status_code in (
                    200,
                    201,
                )
            answer = ask(http, model="again", prompt=[1, FIRST_NEW + 1, 4])
            assert answer.status_code == 200, answer.text
            told.append(answer.json()["choices"][0]["text"])
    assert told[0] == told[1]
