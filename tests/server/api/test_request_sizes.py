"""What one request may ask for is counted before anything is made of it, and refused with the numbers."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from manylora.server.tokenizer.lane import LONG
from tests.server.api.running import BASE, SECONDS, Files, Running, running


def refused(answer: httpx.Response, status: int = 400) -> dict[str, str]:
    assert answer.status_code == status, answer.text
    error: dict[str, str] = answer.json()["error"]
    return error


def test_prompts_times_n_are_counted_before_anything_is_made(
    server: Running, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object, **named: object) -> list[int]:
        raise AssertionError("tokenised what could have been refused")

    monkeypatch.setattr(server.server.deps.tokenizer, "encode", never)
    body = {"model": BASE, "prompt": ["x"] * 256, "n": 128, "max_tokens": 1}
    error = refused(http.post("/v1/completions", json=body))
    assert error["param"] == "n"
    for number in ("256", "128", "32768", "1024"):
        assert number in error["message"]


def test_the_bound_on_answers_is_a_setting(files: Files, tmp_path: Path) -> None:
    with running(files, tmp_path, max_sequences=6) as server, httpx.Client(base_url=server.url) as http:
        body = {"model": BASE, "prompt": ["x", "y", "z"], "max_tokens": 1}
        assert len(http.post("/v1/completions", json=body | {"n": 2}).json()["choices"]) == 6
        refused(http.post("/v1/completions", json=body | {"n": 3}))
        chat = {"model": BASE, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        refused(http.post("/v1/chat/completions", json=chat | {"n": 7}))


def test_a_host_of_choices_leaves_others_their_turn(files: Files, tmp_path: Path) -> None:
    """Slots for four, and 24 choices that each take their time: who comes later is answered long before their end."""
    with running(files, tmp_path, max_running=4, max_waiting=2) as server, server.client() as client:
        body = {"model": BASE, "prompt": ["x", "y", "z"], "n": 8, "max_tokens": 200, "stream": True}
        many = {**body, "ignore_eos": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=many, timeout=30):
            server.wait_until_busy()
            for _ in range(4):
                assert client.completions.create(model=BASE, prompt="x", max_tokens=2).choices
            stats = server.server.engine.snapshot()
            assert stats.waiting + stats.running > 12, "the choices had ended already: this proved nothing"
            with pytest.raises(openai.BadRequestError):
                client.completions.create(model=BASE, prompt="x", n=1000)
        server.wait_until_idle()
        server.check_integrity()


def test_echo_with_logprobs_is_bounded_by_what_it_tells(files: Files, tmp_path: Path) -> None:
    with (
        running(files, tmp_path, max_prompt_logprobs=126) as server,
        httpx.Client(base_url=server.url) as http,
    ):
        body = {"model": BASE, "prompt": [[5] * 3, [6] * 3], "max_tokens": 0, "echo": True, "logprobs": 20}
        told = http.post("/v1/completions", json=body).json()["choices"]
        assert [len(choice["logprobs"]["tokens"]) for choice in told] == [3, 3]
        error = refused(http.post("/v1/completions", json=body | {"n": 2}))
        assert error["param"] == "logprobs"
        for number in ("logprobs 20", "12 prompt tokens", "252 log", "most 126"):
            assert number in error["message"]
        refused(http.post("/v1/completions", json=body | {"prompt": [[5] * 7]}))
        assert server.server.engine.snapshot().waiting == 0
        # Without echo, or without logprobs, prompts are not reported on.
        assert http.post("/v1/completions", json=body | {"echo": False, "max_tokens": 1, "n": 3}).is_success
        assert http.post("/v1/completions", json={**body, "logprobs": None, "n": 3}).is_success


@contextmanager
def tokenizer_held(server: Running) -> Iterator[threading.Event]:
    """Hold texts that begin with "held" where they are tokenised until the block ends; the event says that one is.

    A long one is held before its length alone says that it has too many tokens.
    """
    reached, go_on = threading.Event(), threading.Event()
    tokenizer = server.server.deps.tokenizer
    check_length = tokenizer.check_length

    def wait(text: str, at_most: int) -> None:
        if text.startswith("held"):
            reached.set()
            go_on.wait(SECONDS)
        check_length(text, at_most)

    tokenizer.check_length = wait  # type: ignore[method-assign]
    try:
        yield reached
    finally:
        go_on.set()
        del tokenizer.check_length


def test_texts_to_look_at_are_bounded_in_length(files: Files, tmp_path: Path) -> None:
    with (
        running(files, tmp_path, max_tokenize_characters=30) as server,
        httpx.Client(base_url=server.url) as http,
    ):
        assert http.post("/tokenize", json={"prompt": " " * 30}).is_success
        error = refused(http.post("/tokenize", json={"prompt": " " * 31}))
        assert error["param"] == "prompt"
        assert "31" in error["message"]
        assert "30" in error["message"]
        chat = {"messages": [{"role": "user", "content": "x" * 31}]}
        assert refused(http.post("/tokenize", json=chat))["param"] == "messages"


def test_texts_to_look_at_wait_for_each_other_and_nobody_else_does(
    server: Running, client: openai.OpenAI, http: httpx.Client
) -> None:
    most = 16
    with ThreadPoolExecutor(most) as pool, tokenizer_held(server) as reached:
        looks = [pool.submit(http.post, "/tokenize", json={"prompt": "held"}) for _ in range(most)]
        assert reached.wait(SECONDS)
        lane = server.server.deps.tokenising.looks
        server.wait_until("sixteen with the tokenizer", lambda: lane.inside == most)
        for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [5]})):
            answer = http.post(path, json=body)
            assert refused(answer, 429)
            assert int(answer.headers["retry-after"]) >= 1
        assert client.completions.create(model=BASE, prompt="x", max_tokens=1).choices
    assert all(look.result().is_success for look in looks)
    assert http.post("/tokenize", json={"prompt": "x"}).is_success


def test_a_prompt_that_no_text_is_like_is_refused_before_it_is_tokenised(
    server: Running, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a normaliser hides how many tokens a text has at least, its length must be bounded all the same."""
    monkeypatch.setattr(server.server.deps.tokenizer, "least_tokens", lambda text: 0)
    context = server.server.deps.settings.context_length
    most = max(LONG, 16 * context)
    with tokenizer_held(server) as reached:
        for path, asked in (
            ("/v1/completions", {"prompt": "held" + "-" * most}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "-" * (most + 1)}]}),
        ):
            error = refused(http.post(path, json={"model": BASE, "max_tokens": 1, **asked}))
            assert str(most) in error["message"]
            assert error["param"] == next(iter(asked))
        assert not reached.is_set()


def test_long_prompts_keep_no_short_one_waiting(server: Running, client: openai.OpenAI) -> None:
    long = "held" + " " * LONG
    with ThreadPoolExecutor(6) as pool, tokenizer_held(server) as reached:
        asked = [pool.submit(refused_for_its_length, server, long) for _ in range(6)]
        assert reached.wait(SECONDS)
        for _ in range(3):
            assert client.completions.create(model=BASE, prompt="x", max_tokens=1).choices
        assert not any(each.done() for each in asked)
    assert all(each.result() for each in asked)


def refused_for_its_length(server: Running, prompt: str) -> bool:
    body = {"model": BASE, "prompt": prompt, "max_tokens": 1}
    error = refused(httpx.post(f"{server.url}/v1/completions", json=body, timeout=SECONDS))
    return error["code"] == "context_length_exceeded"
