"""Mixtures that are refused: each field that is wrong in itself, and parts that make no sense, by name and status."""

import httpx
import pytest

from manylora.server.api.mixture_fields import MAX_PARTS
from manylora.server.config import ServeSettings
from tests.server.api.running import BASE

NINE = [{"name": f"{number}"} for number in range(9)]


def refused(http: httpx.Client, path: str, body: dict[str, object]) -> tuple[int, str, str | None, str]:
    answer = http.post(path, json=body)
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return answer.status_code, error["param"], error["code"], error["message"]


WRONG_ADAPTERS: list[tuple[object, str, str]] = [
    ("a", "adapters", "list"),
    ({"a": 1}, "adapters", "list"),
    (["a"], "adapters.0", "Input should be an object"),
    ([{"weight": 1}], "adapters.0.name", "required"),
    ([{"name": ""}], "adapters.0.name", "at least 1 character"),
    ([{"name": 5}], "adapters.0.name", "string"),
    ([{"name": "a", "weight": "0.7"}], "adapters.0.weight", "valid number"),
    ([{"name": "a", "weight": True}], "adapters.0.weight", "valid number"),
    ([{"name": "a", "weight": [1]}], "adapters.0.weight", "valid number"),
    ([{"name": "a"}, {"name": "b", "weigth": 1}], "adapters.1.weigth", "did you mean 'weight'"),
    ([{"name": "a", "scale": 1}], "adapters.0.scale", "it is called weight"),
    ([{"adapter": "a"}], "adapters.0.adapter", "a request's part says name"),
    ([{"id": 1}], "adapters.0.id", "by its adapter's name"),
    ([{"name": "a", "user": "me"}], "adapters.0.user", "not a field"),
    ([{"name": "a"}] * 65, "adapters", "64"),
]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize"])
@pytest.mark.parametrize(("adapters", "param", "says"), WRONG_ADAPTERS, ids=lambda each: str(each)[:40])
def test_a_wrong_field_of_adapters_is_named(
    http: httpx.Client, path: str, adapters: object, param: str, says: str
) -> None:
    prompt = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    status, named, code, message = refused(http, path, {"model": BASE, **prompt, "adapters": adapters})
    assert (status, named, code) == (400, param, None)
    assert says in message


@pytest.mark.parametrize("text", ["1e999", "-1e999", "NaN"])
def test_a_weight_that_is_not_finite_is_refused(http: httpx.Client, text: str) -> None:
    body = f'{{"model": "{BASE}", "prompt": "x", "adapters": [{{"name": "a", "weight": {text}}}]}}'
    refusal = http.post("/v1/completions", content=body)
    # NaN is no JSON at all.
    assert (refusal.status_code, refusal.json()["error"]["param"]) == (
        400,
        None if "N" in text else "adapters.0.weight",
    )
    # What a float32 can't hold isn't either.
    for fields in (
        {"model": "a:1e39"},
        {"model": "a:inf"},
        {"model": BASE, "adapters": [{"name": "a", "weight": 1e39}]},
    ):
        status, param, code, message = refused(http, "/v1/completions", {"prompt": "x", **fields})
        assert (status, param, code) == (
            400,
            "adapters" if "adapters" in fields else "model",
            "invalid_mixture",
        )
        assert "finite" in message


WRONG_MERGED: list[tuple[object, str, str]] = [
    (
        {"ids": ["a"], "merge_strategy": "ties"},
        "merged_adapters.merge_strategy",
        "'ties' isn't done for a request",
    ),
    (
        {"ids": ["a"], "merge_strategy": "dare_ties"},
        "merged_adapters.merge_strategy",
        "'dare_ties' isn't done",
    ),
    (
        {"ids": ["a"], "merge_strategy": "dare_linear"},
        "merged_adapters.merge_strategy",
        "'dare_linear' isn't done",
    ),
    ({"ids": ["a"], "merge_strategy": "slerp"}, "merged_adapters.merge_strategy", "linear"),
    ({"ids": ["a"], "density": 0.5}, "merged_adapters.density", "only 'linear'"),
    (
        {"ids": ["a"], "majority_sign_method": "frequency"},
        "merged_adapters.majority_sign_method",
        "only 'linear'",
    ),
    ({"ids": ["a", "b"], "weights": [1]}, "merged_adapters.weights", "1 of them for 2 ids"),
    ({"ids": []}, "merged_adapters.ids", "at least 1"),
    ({"weights": [1]}, "merged_adapters.ids", "required"),
    ({"ids": ["a"], "weights": ["1"]}, "merged_adapters.weights.0", "valid number"),
    ([], "merged_adapters", "object"),
]


@pytest.mark.parametrize(("merged", "param", "says"), WRONG_MERGED, ids=lambda each: str(each)[:60])
def test_loraxs_field_is_refused_by_name_where_it_means_something_else(
    http: httpx.Client, merged: object, param: str, says: str
) -> None:
    body = {"model": BASE, "prompt": "x", "merged_adapters": merged}
    status, named, _, message = refused(http, "/v1/completions", body)
    assert (status, named) == (400, param)
    assert says in message


def test_loraxs_client_may_send_all_of_its_fields(http: httpx.Client) -> None:
    whole = {
        "ids": ["a", "b"],
        "weights": [0.5, 1],
        "merge_strategy": "linear",
        "density": 1.0,
        "majority_sign_method": "total",
    }
    for merged in (whole, {"ids": ["a"], "weights": [], "merge_strategy": None, "density": 0}):
        body = {"model": BASE, "prompt": "x", "max_tokens": 1, "merged_adapters": merged}
        assert http.post("/v1/completions", json=body).status_code == 200


MAKES_NO_SENSE: list[tuple[dict[str, object], int, str, str | None, str]] = [
    (
        {"adapters": [{"name": "a"}, {"name": "a"}]},
        400,
        "adapters",
        "invalid_mixture",
        "'a' is in the mixture twice",
    ),
    ({"adapters": NINE}, 400, "adapters", "invalid_mixture", "9 parts, at most 8"),
    ({"adapters": [{"name": BASE}]}, 400, "adapters", "invalid_mixture", "is the base"),
    ({"adapters": [{"name": "nobody"}]}, 404, "adapters", "model_not_found", "part 'nobody' does not exist"),
    ({"merged_adapters": {"ids": ["nobody"]}}, 404, "merged_adapters", "model_not_found", "'nobody'"),
    ({"merged_adapters": {"ids": ["a", "a"]}}, 400, "merged_adapters", "invalid_mixture", "twice"),
    ({"model": "a", "adapters": [{"name": "b"}]}, 400, "adapters", None, "it names the base, tiny"),
    ({"model": "a+b", "adapters": [{"name": "b"}]}, 400, "adapters", None, "it names the base, tiny"),
    ({"model": "a", "merged_adapters": {"ids": ["b"]}}, 400, "merged_adapters", None, "it names the base"),
    (
        {"adapters": [{"name": "a"}], "merged_adapters": {"ids": ["a"]}},
        400,
        "merged_adapters",
        None,
        "doesn't go with adapters",
    ),
    ({"model": "a+a:0.5"}, 400, "model", "invalid_mixture", "twice"),
    ({"model": f"a+{BASE}"}, 400, "model", "invalid_mixture", "is the base"),
    ({"model": "a+"}, 400, "model", "invalid_mixture", "no name"),
    ({"model": "a:nan"}, 400, "model", "invalid_mixture", "finite"),
    ({"model": "a+nobody:2"}, 404, "model", "model_not_found", "part 'nobody' does not exist"),
    ({"model": "+".join("abcdefghi")}, 400, "model", "invalid_mixture", "9 parts, at most 8"),
    ({"adapter_id": "a"}, 400, "adapter_id", None, "goes into model"),
    ({"lora": [{"id": 0, "scale": 1}]}, 400, "lora", None, '"adapters"'),
    ({"mixture": [{"adapter": "a"}]}, 400, "mixture", None, "POST /adapters"),
]


@pytest.mark.parametrize(
    ("fields", "status", "param", "code", "says"), MAKES_NO_SENSE, ids=lambda each: str(each)[:60]
)
def test_what_makes_no_sense_together_is_told_with_the_field_that_asked(
    http: httpx.Client, fields: dict[str, object], status: int, param: str, code: str | None, says: str
) -> None:
    got = refused(http, "/v1/completions", {"model": BASE, "prompt": "x", **fields})
    assert got[:3] == (status, param, code)
    assert says in got[3]


@pytest.mark.parametrize("fields", [{"adapters": []}, {"adapters": None}, {"merged_adapters": None}])
def test_no_parts_ask_for_nothing(http: httpx.Client, fields: dict[str, object]) -> None:
    for model in (BASE, "a"):
        answer = http.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 1, **fields})
        assert answer.status_code == 200
        assert "adapters" not in answer.json()


def test_a_missing_weight_is_1(http: httpx.Client) -> None:
    body = {
        "model": BASE,
        "prompt": "x",
        "max_tokens": 1,
        "adapters": [{"name": "a"}, {"name": "b", "weight": None}],
    }
    assert [part["weight"] for part in http.post("/v1/completions", json=body).json()["adapters"]] == [1, 1]


def test_a_body_may_name_as_many_parts_as_a_server_may_take() -> None:
    with pytest.raises(ValueError, match=f"less than or equal to {MAX_PARTS}"):
        ServeSettings(max_mixture_parts=MAX_PARTS + 1)
    assert ServeSettings(max_mixture_parts=MAX_PARTS).max_mixture_parts == MAX_PARTS
