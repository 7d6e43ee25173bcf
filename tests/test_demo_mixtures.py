"""Mixtures of the demo's adapters, asked for by OpenAI's own client, which knows of none."""

from collections.abc import Iterator

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.serving import Served, serving

NAME = "sql:0.7+pirate:0.3"
PARTS = [{"name": "sql", "weight": 0.7}, {"name": "pirate", "weight": 0.3}]
TABLE = "crew\nname | age | city\nAda | 36 | London\nLeo | 52 | Rome\n\nWhich city does Ada have?"
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": TABLE}]
TOKENS = 24


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("demo"), "--mixture", f"sailor-sql={NAME}") as served:
        yield served


@pytest.fixture
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def whole(client: openai.OpenAI, model: str, **more: object) -> str:
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, temperature=0, max_tokens=TOKENS, extra_body=more
    )
    assert answer.model == model
    return answer.choices[0].message.content or ""


def streamed(client: openai.OpenAI, model: str, **more: object) -> str:
    chunks = client.chat.completions.create(
        model=model, messages=MESSAGES, temperature=0, max_tokens=TOKENS, stream=True, extra_body=more
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_a_name_is_all_that_it_takes(client: openai.OpenAI) -> None:
    answer = whole(client, NAME)
    assert answer == "SELECT city FROM crew WHERE name = 'Ada';"
    ways: list[tuple[str, dict[str, object]]] = [
        (NAME, {}),
        ("pirate:0.3+sql:0.7", {}),
        ("sailor-sql", {}),
        ("demo", {"adapters": PARTS}),
        ("demo", {"merged_adapters": {"ids": ["sql", "pirate"], "weights": [0.7, 0.3]}}),
    ]
    for model, more in ways:
        assert whole(client, model, **more) == answer
        assert streamed(client, model, **more) == answer


def test_completions_take_it_too(client: openai.OpenAI) -> None:
    def text(model: str, **more: object) -> str:
        asked = {"prompt": TABLE, "max_tokens": TOKENS, "temperature": 0.0}
        answer = client.completions.create(model=model, extra_body=more, **asked)  # type: ignore[call-overload]
        chunks = client.completions.create(model=model, stream=True, extra_body=more, **asked)  # type: ignore[call-overload]
        found: str = answer.choices[0].text
        assert "".join(chunk.choices[0].text for chunk in chunks) == found
        return found

    assert text(NAME) == text("demo", adapters=PARTS) == text("sailor-sql")


def test_weights_decide_whose_answer_it_is(client: openai.OpenAI) -> None:
    answers = {
        share: whole(client, f"sql:{1 - share:.1f}+pirate:{share:.1f}") for share in (0.0, 0.2, 0.8, 1.0)
    }
    assert answers[0.0] == answers[0.2] == whole(client, "sql")
    assert answers[0.8] == answers[1.0] == whole(client, "pirate")


def test_the_parts_are_told(client: openai.OpenAI, server: Served) -> None:
    raw = client.chat.completions.with_raw_response.create(model=NAME, messages=MESSAGES, max_tokens=1)
    told = raw.parse().model_extra
    assert told is not None
    assert [(part["name"], part["weight"]) for part in told["adapters"]] == [("sql", 0.7), ("pirate", 0.3)]
    ids = {each["name"]: each["id"] for each in httpx.get(f"{server.url}/adapters").json()["data"]}
    header = f"sql@1#{ids['sql']}:0.7+pirate@1#{ids['pirate']}:0.3"
    assert raw.headers["x-manylora-adapters"] == header
    listed = {model.id: model.model_extra for model in client.models.list()}
    assert listed["sailor-sql"] is not None
    assert listed["sailor-sql"]["mixture"] == [
        {"adapter": "sql", "weight": 0.7},
        {"adapter": "pirate", "weight": 0.3},
    ]
