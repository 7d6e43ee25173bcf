"""POST /score and /rerank: cosines of embeddings, in the shapes of vLLM, Jina and Cohere."""

import httpx
import numpy as np
import openai
import pytest

from tests.server.api.running import BASE

TEXTS = ["what is sql", "a language for tables", "the sea is deep", "pirates sail"]


def cosine(one: list[float], other: list[float]) -> float:
    return float(np.dot(np.array(one, dtype=np.float64), other))


@pytest.fixture
def vectors(client: openai.OpenAI) -> list[list[float]]:
    return [each.embedding for each in client.embeddings.create(model="a", input=TEXTS).data]


@pytest.mark.parametrize("route", ["/score", "/v1/score"])
def test_one_text_is_scored_with_each_of_several(
    http: httpx.Client, vectors: list[list[float]], route: str
) -> None:
    answer = http.post(route, json={"model": "a", "text_1": TEXTS[0], "text_2": TEXTS[1:]}).json()
    assert (answer["object"], answer["model"]) == ("list", "a")
    assert [(each["index"], each["object"]) for each in answer["data"]] == [(i, "score") for i in range(3)]
    expected = [cosine(vectors[0], each) for each in vectors[1:]]
    assert [each["score"] for each in answer["data"]] == pytest.approx(expected, abs=1e-6)
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > 0


def test_pairs_go_with_each_other_and_a_text_is_all_itself(
    http: httpx.Client, vectors: list[list[float]]
) -> None:
    body = {"model": "a", "queries": TEXTS[:2], "documents": [TEXTS[2], TEXTS[1]]}
    scores = [each["score"] for each in http.post("/score", json=body).json()["data"]]
    assert scores == pytest.approx([cosine(vectors[0], vectors[2]), 1], abs=1e-6)
    assert max(scores) <= 1


@pytest.mark.parametrize("route", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_documents_come_back_the_nearest_first(
    http: httpx.Client, vectors: list[list[float]], route: str
) -> None:
    body = {"model": "a", "query": TEXTS[0], "documents": [*TEXTS[1:3], {"text": TEXTS[3]}, TEXTS[0]]}
    answer = http.post(route, json=body).json()
    assert answer["results"][0]["index"] == 3
    scores = {each["index"]: each["relevance_score"] for each in answer["results"]}
    expected = [*(cosine(vectors[0], each) for each in vectors[1:]), 1.0]
    assert [scores[index] for index in range(4)] == pytest.approx(expected, abs=1e-6)
    ranked = [each["relevance_score"] for each in answer["results"]]
    assert ranked == sorted(ranked, reverse=True)
    assert {each["index"]: each["document"]["text"] for each in answer["results"]} == dict(
        enumerate([*TEXTS[1:], TEXTS[0]])
    )
    few = http.post(route, json={**body, "top_n": 2, "return_documents": False}).json()["results"]
    assert few == [
        {"index": e["index"], "relevance_score": e["relevance_score"]} for e in answer["results"][:2]
    ]


def test_equals_keep_their_order(http: httpx.Client) -> None:
    body = {"model": BASE, "query": "x", "documents": ["same"] * 5}
    assert [each["index"] for each in http.post("/rerank", json=body).json()["results"]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("/score", {"text_1": "x"}, "text_2"),
        ("/score", {"text_2": "x"}, "text_1"),
        ("/score", {"text_1": "x", "queries": "x", "text_2": "y"}, "queries"),
        ("/score", {"text_1": ["x", "y"], "text_2": ["x"] * 3}, "text_1"),
        ("/score", {"text_1": "x", "text_2": []}, "text_1"),
        ("/score", {"text_1": "x", "text_2": ["y", ""]}, "text_1"),
        ("/rerank", {"query": "x"}, "documents"),
        ("/rerank", {"documents": ["x"]}, "query"),
        ("/rerank", {"query": "x", "documents": []}, "documents"),
        ("/rerank", {"query": "x", "documents": ["y"] * 2048}, "documents"),
        ("/rerank", {"query": "x", "documents": ["y"], "top_n": -1}, "top_n"),
        ("/rerank", {"query": "x", "documents": ["y"], "max_tokens_per_doc": 5}, "max_tokens_per_doc"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    http: httpx.Client, route: str, body: dict[str, object], param: str
) -> None:
    answer = http.post(route, json={"model": BASE, **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param, answer.text
