"""Ids that no vocabulary has are refused before anything is made of them, with echo as without."""

import httpx
import pytest

from manylora.loadtest.material.checkpoints import TINY
from tests.server.api.running import BASE


@pytest.mark.parametrize("wrong", [-1, TINY.vocab_size, 2**31, 2**32, 2**63, 2**64, 10**30])
@pytest.mark.parametrize("echo", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_ids_beyond_the_vocabulary_are_a_400(
    http: httpx.Client, wrong: int, echo: bool, stream: bool
) -> None:
    for prompt in ([1, wrong], [[1], [2, wrong]]):
        body = {"model": BASE, "prompt": prompt, "max_tokens": 1, "echo": echo, "stream": stream}
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "prompt"


def test_a_prompt_over_the_context_is_refused_with_echo_too(http: httpx.Client) -> None:
    body = {"model": BASE, "prompt": [1] * 100_000, "max_tokens": 1, "echo": True}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
