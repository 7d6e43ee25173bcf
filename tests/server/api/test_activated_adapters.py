"""An activated adapter over HTTP: the base until its invocation, itself from there on, under its own name always."""

import json
import shutil
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from manylora.loadtest.material.checkpoints import ALL_LINEAR, AdapterShape, write_adapter
from manylora.loadtest.material.manylora_client import Metrics
from tests.server.api.running import BASE, Files

WORDS = (300, 301)
TALK = [(7 * place + 3) % 290 for place in range(70)]
"""Four blocks of 16 and a part of one."""


@pytest.fixture
def judge(files: Files, http: httpx.Client) -> Iterator[str]:
    """An adapter with the factors of "a", which acts from WORDS on."""
    path = files.adapters / "judge"
    shape = AdapterShape(rank=8, targets=ALL_LINEAR, seed=1, invocation=WORDS)
    write_adapter(path, files.base, shape)
    http.post("/adapters", json={"name": "judge", "src": "judge"}).raise_for_status()
    yield "judge"
    http.delete("/adapters/judge").raise_for_status()
    shutil.rmtree(path)


def complete(http: httpx.Client, model: str, prompt: object, **fields: object) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0, "logprobs": 0, **fields}
    answer = http.post("/v1/completions", json={"ignore_eos": True, **body})
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def logprobs(answer: dict[str, Any], choice: int = 0) -> list[float]:
    found: list[float] = answer["choices"][choice]["logprobs"]["token_logprobs"]
    return found


def test_it_is_the_base_without_its_invocation_and_itself_from_it_on(http: httpx.Client, judge: str) -> None:
    begun, plain = [*WORDS, *TALK], [*TALK, 5]
    both = complete(http, judge, [plain, begun], n=2)
    for choice in (0, 1):
        assert logprobs(both, choice) == logprobs(complete(http, BASE, plain))
        assert logprobs(both, 2 + choice) == logprobs(complete(http, "a", begun))
    later = logprobs(complete(http, judge, [*TALK, *WORDS]))
    assert later not in [logprobs(complete(http, model, [*TALK, *WORDS])) for model in (BASE, "a")]


def test_the_base_s_prefix_is_found_and_the_answer_is_that_of_none_found(
    http: httpx.Client, judge: str
) -> None:
    talk = [token + 1 for token in TALK]
    alone = complete(http, judge, [*talk, *WORDS])
    assert alone["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    other = [token + 2 for token in TALK]
    complete(http, BASE, [*other, 9], max_tokens=1)
    shared = complete(http, judge, [*other, *WORDS])
    assert shared["usage"]["prompt_tokens_details"]["cached_tokens"] == 64
    assert logprobs(shared) == logprobs(complete(http, judge, [*other, *WORDS], echo=True))[len(other) + 2 :]


def test_log_probabilities_of_the_prompt_are_the_base_s_until_then(http: httpx.Client, judge: str) -> None:
    prompt = [*TALK, *WORDS, 5, 6, 7]
    own, base = (logprobs(complete(http, model, prompt, echo=True)) for model in (judge, BASE))
    # The first word is predicted by what stands before it.
    assert own[: len(TALK) + 1] == base[: len(TALK) + 1]
    assert all(a != b for a, b in zip(own[len(TALK) + 1 :], base[len(TALK) + 1 :], strict=True))


def test_texts_without_it_have_the_base_s_vectors(http: httpx.Client, judge: str) -> None:
    def vectors(model: str, pooling: str) -> list[list[float]]:
        body = {"model": model, "input": [TALK, [*WORDS, *TALK]], "pooling": pooling}
        data = http.post("/v1/embeddings", json=body).raise_for_status().json()["data"]
        return [each["embedding"] for each in data]

    for pooling in ("last", "mean"):
        absent, begun = vectors(judge, pooling)
        assert absent == vectors(BASE, pooling)[0]
        assert begun == vectors("a", pooling)[1]


def test_it_is_shown_with_its_invocation(http: httpx.Client, judge: str) -> None:
    told = {each["name"]: each["alora_invocation_tokens"] for each in http.get("/adapters").json()["data"]}
    assert told[judge] == list(WORDS)
    assert told["a"] is None
    assert http.get(f"/adapters/{judge}").json()["alora_invocation_tokens"] == list(WORDS)


def test_its_requests_are_counted_under_its_name(http: httpx.Client, judge: str) -> None:
    def counted() -> float:
        metrics = Metrics.parse(http.get("/metrics").text)
        return metrics.total("manylora_requests_total", f'adapter="{judge}"')

    before = counted()
    complete(http, judge, TALK)
    assert counted() == before + 1


@pytest.mark.parametrize(
    ("ids", "told"), [([], "at least one"), ([320], "ids 0 to 319"), (["a"], "list of token ids")]
)
def test_what_can_not_be_an_invocation_is_refused_by_name(
    http: httpx.Client, files: Files, judge: str, ids: list[object], told: str
) -> None:
    path = files.adapters / "judge" / "adapter_config.json"
    config = {**json.loads(path.read_text()), "alora_invocation_tokens": ids}
    path.write_text(json.dumps(config))
    answer = http.post("/adapters", json={"name": "other", "src": "judge"})
    assert answer.status_code == 400
    assert "alora_invocation_tokens" in answer.json()["error"]["message"]
    assert told in answer.json()["error"]["message"]
