"""What one request may ask for is counted before anything is made of it, and refused with the numbers."""

from pathlib import Path

import httpx
import openai
import pytest

from tests.server.api.running import BASE, Files, Running, running


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
