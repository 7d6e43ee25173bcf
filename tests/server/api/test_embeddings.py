"""POST /v1/embeddings: through the openai client, against transformers, beside generation."""

import base64
import json
import math
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import torch
from transformers import AutoModel

from manylora.server.config import ServeSettings
from tests.server.api.running import BASE, Files, Running, running

IDS = [[5, 9, 2, 7, 30, 8, 1], [4], [11, 12, 13]]


def states(base: Path, ids: Sequence[int]) -> np.ndarray:
    model = AutoModel.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor([list(ids)])).last_hidden_state[0].double().numpy()
    return found


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)  # type: ignore[no-any-return]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_the_vectors_are_those_of_transformers_in_the_order_of_the_inputs(
    client: openai.OpenAI, files: Files, pooling: str
) -> None:
    answer = client.embeddings.create(model=BASE, input=IDS, extra_body={"pooling": pooling})
    assert [each.index for each in answer.data] == [0, 1, 2]
    for ids, each in zip(IDS, answer.data, strict=True):
        told = states(files.base, ids)
        expected = unit(told[-1] if pooling == "last" else told.mean(0))
        assert np.abs(np.array(each.embedding) - expected).max() < 1e-5
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (11, 11)


def test_who_asks_for_nothing_gets_base64_by_the_client_and_it_is_the_same_as_numbers(
    client: openai.OpenAI, http: httpx.Client
) -> None:
    body = {"model": "a", "input": "some text"}
    decoded = client.embeddings.create(model="a", input="some text").data[0].embedding
    numbers = http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    told = http.post("/v1/embeddings", json={**body, "encoding_format": "base64"}).json()["data"][0][
        "embedding"
    ]
    assert isinstance(numbers, list)
    assert np.frombuffer(base64.b64decode(told), dtype="<f4").tolist() == numbers
    assert decoded == numbers
    assert math.isclose(np.linalg.norm(numbers), 1, rel_tol=1e-6)


def test_a_text_is_its_tokens_and_each_kind_of_input_is_taken(
    client: openai.OpenAI, http: httpx.Client
) -> None:
    ids = http.post("/tokenize", json={"prompt": "some text"}).json()["tokens"]
    inputs: list[object] = ["some text", ["some text"], ids, [ids]]
    vectors = [client.embeddings.create(model="b", input=each).data[0].embedding for each in inputs]  # type: ignore[arg-type]
    assert all(each == vectors[0] for each in vectors)


def test_adapters_and_mixtures_have_vectors_of_their_own(client: openai.OpenAI, http: httpx.Client) -> None:
    def of(model: str, **more: object) -> list[float]:
        return client.embeddings.create(model=model, input="some text", extra_body=more).data[0].embedding

    seen = [of(BASE), of("a"), of("b"), of("a:0.5+b:2"), of(BASE, adapters=[{"name": "c"}])]
    assert len({tuple(each) for each in seen}) == 5
    assert of("a:1") == of("a")
    assert of(BASE, adapters=[{"name": "a", "weight": 0.5}, {"name": "b", "weight": 2}]) == of("a:0.5+b:2")
    answer = http.post("/v1/embeddings", json={"model": "a:0.5+b", "input": "x"})
    assert [part["name"] for part in answer.json()["adapters"]] == ["a", "b"]
    assert answer.headers["x-manylora-adapters"].startswith("a@1#")


def test_vectors_are_as_they_are_if_that_is_asked(client: openai.OpenAI, files: Files) -> None:
    told = (
        client.embeddings.create(model=BASE, input=IDS[0], extra_body={"normalize": False}).data[0].embedding
    )
    assert np.abs(np.array(told) - states(files.base, IDS[0])[-1]).max() < 1e-4


def test_embeddings_are_made_while_streams_go_on(server: Running, client: openai.OpenAI) -> None:
    alone = (
        client.embeddings.create(model="a", input="some text", extra_body={"pooling": "mean"})
        .data[0]
        .embedding
    )
    stream = client.completions.create(
        model="b", prompt="x", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    beside = (
        client.embeddings.create(model="a", input="some text", extra_body={"pooling": "mean"})
        .data[0]
        .embedding
    )
    assert server.server.engine.snapshot().running >= 1, "the stream had ended"
    stream.close()
    assert beside == alone


def test_who_hangs_up_ends_the_work(server: Running) -> None:
    with server.held() as go_on:
        failed = threading.Event()

        def ask() -> None:
            with httpx.Client(base_url=server.url, timeout=0.3) as short:
                try:
                    short.post("/v1/embeddings", json={"model": "a", "input": ["x"] * 50})
                except httpx.TimeoutException:
                    failed.set()

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        assert failed.is_set()
        go_on.set()
    server.wait_until_idle()


@pytest.mark.parametrize(
    ("more", "param", "said"),
    [
        ({"input": ""}, "input", "input 0 is empty"),
        ({"input": ["x", ""]}, "input", "input 1 is empty"),
        ({"input": []}, "input", "0 inputs"),
        ({"input": [[]]}, "input", "is empty"),
        ({"input": ["x"] * 2049}, "input", "2049 inputs"),
        ({"input": [5, 10**6]}, "input", "1000000"),
        ({"input": [5] * 100_000}, "input", "maximum context length is 1024"),
        ({"input": "x " * 20_000}, "input", "maximum context length is 1024"),
        ({"input": [[1] * 500] * 601}, "input", "at most 300000"),
        ({"input": "x", "dimensions": 8}, "dimensions", "--matryoshka"),
        ({"input": "x", "dimensions": 10**6}, "dimensions", "not 1000000"),
        ({"input": "x", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format", "base64"),
        ({"input": "x", "pooling": "cls"}, "pooling", "mean"),
        ({"input": "x", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "not cut"),
        ({"input": "x", "made_up": 1}, "made_up", "not a field"),
        ({}, "input", "required"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    http: httpx.Client, more: dict[str, object], param: str, said: str
) -> None:
    answer = http.post("/v1/embeddings", json={"model": BASE, **more})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert said in error["message"]


def test_an_unknown_model_is_404_and_what_asks_for_nothing_passes(http: httpx.Client) -> None:
    assert http.post("/v1/embeddings", json={"model": "nobody", "input": "x"}).status_code == 404
    passes = {"user": "me", "dimensions": None, "truncate_prompt_tokens": -1, "embed_dtype": "float32"}
    assert http.post("/v1/embeddings", json={"model": BASE, "input": "x", **passes}).status_code == 200


def test_the_server_says_how_texts_are_pooled_and_whether_vectors_may_be_cut(
    files: Files, tmp_path: Path
) -> None:
    assert ServeSettings().pooling == "auto"
    with running(files, tmp_path, pooling="mean", matryoshka=True) as server, server.client() as client:
        whole = client.embeddings.create(model=BASE, input=IDS[0]).data[0].embedding
        assert np.abs(np.array(whole) - unit(states(files.base, IDS[0]).mean(0))).max() < 1e-5
        cut = client.embeddings.create(model=BASE, input=IDS[0], dimensions=8).data[0].embedding
        assert np.allclose(cut, unit(np.array(whole[:8])), atol=1e-6)
        last = client.embeddings.create(model=BASE, input=IDS[0], extra_body={"pooling": "last"})
        assert last.data[0].embedding != whole


def with_own_base(files: Files, directory: Path) -> Files:
    """Return files with a copy of the base."""
    own = Files(directory)
    own.base.parent.mkdir()
    shutil.copytree(files.base, own.base)
    return own


def said(directory: Path, *modes: str) -> None:
    """Have an adapter or a base say how texts are pooled, as sentence-transformers does."""
    (directory / "1_Pooling").mkdir()
    config = {f"pooling_mode_{mode}": True for mode in modes}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(config))


def test_an_adapter_s_own_pooling_goes_over_the_servers_and_a_requests_over_that(
    files: Files, tmp_path: Path
) -> None:
    own = with_own_base(files, tmp_path / "files")
    said(own.base, "mean_tokens")
    for name, mode in (("mean", "mean_tokens"), ("last", "lasttoken"), ("plain", None), ("cls", "cls_token")):
        shutil.copytree(files.adapters / "a", own.adapters / name)
        if mode is not None:
            said(own.adapters / name, mode)
    with running(own, tmp_path / "data") as server, httpx.Client(base_url=server.url, timeout=30) as http:

        def vector(model: str, **more: object) -> list[float]:
            body = {"model": model, "input": IDS[0], **more}
            answer = http.post("/v1/embeddings", json=body)
            assert answer.status_code == 200, answer.text
            found: list[float] = answer.json()["data"][0]["embedding"]
            return found

        for name in ("mean", "last", "plain"):
            http.post("/adapters", json={"name": name, "src": name}).raise_for_status()
        refused = http.post("/adapters", json={"name": "cls", "src": "cls"})
        assert refused.status_code == 400
        assert "cls" in refused.json()["error"]["message"]
        mean, last = vector("plain", pooling="mean"), vector("plain", pooling="last")
        assert mean != last
        assert vector("mean") == vector("plain") == vector("last", pooling="mean") == mean
        assert vector("last") == vector("mean", pooling="last") == vector("last:1") == last
        assert vector(BASE) == vector(BASE, pooling="mean") != vector(BASE, pooling="last")
        assert vector("last:0.5+plain") == vector("last:0.5+plain", pooling="last")
        scored = {"model": "last", "text_1": "x", "text_2": "yz"}
        scores = [
            http.post("/v1/score", json={**scored, **more}).json()["data"][0]["score"]
            for more in ({}, {"pooling": "last"}, {"pooling": "mean"})
        ]
        assert scores[0] == scores[1] != scores[2]
        differ = http.post("/v1/embeddings", json={"model": "mean:0.5+last", "input": "x"})
        assert (differ.status_code, differ.json()["error"]["param"]) == (400, "pooling")
        assert vector("mean:0.5+last", pooling="mean")
    with running(own, tmp_path / "data") as server:  # known again from the store
        again = httpx.post(f"{server.url}/v1/embeddings", json={"model": "last", "input": IDS[0]}, timeout=30)
        assert again.json()["data"][0]["embedding"] == last


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_base_that_pools_in_a_way_that_is_not_served_starts_only_with_another(
    files: Files, tmp_path: Path
) -> None:
    own = with_own_base(files, tmp_path / "files")
    said(own.base, "cls_token")
    own.adapters.mkdir()
    with pytest.raises(ValueError, match="pooled by cls"), running(own, tmp_path / "data"):
        pass
    with running(own, tmp_path / "data", pooling="last"):
        pass
