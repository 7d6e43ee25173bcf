"""/v1/messages asked by Anthropic's own client."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.api.running import SECONDS, Running

anthropic = pytest.importorskip("anthropic")
ASK: dict[str, Any] = {"model": "a", "max_tokens": 12, "messages": [{"role": "user", "content": "x"}]}

GREEDY = {"temperature": 0}


@pytest.fixture
def client(server: Running) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=SECONDS) as client:
        yield client


def test_it_reads_answers_and_streams(client: Any) -> None:
    message = client.messages.create(**ASK, extra_body=GREEDY)
    with client.messages.stream(**ASK, extra_body=GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text == message.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 12)
    counted = client.messages.count_tokens(model="a", messages=ASK["messages"])
    usage = message.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def test_it_lists_models(client: Any) -> None:
    models = {model.id: model for model in client.models.list()}
    assert {"a", "b"} < set(models)
    assert (models["a"].type, models["a"].display_name) == ("model", "a")
    assert client.models.retrieve("a").created_at == models["a"].created_at
    assert models["a"].created_at.year > 2000


def test_it_reads_errors(client: Any) -> None:
    with pytest.raises(anthropic.NotFoundError) as raised:
        client.messages.create(**{**ASK, "model": "nobody"})
    assert raised.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(**{**ASK, "messages": []})


def test_a_conversation_over_the_context_is_told_in_anthropics_words(client: Any) -> None:
    """Claude Code reads the numbers, and asks for less."""
    with pytest.raises(anthropic.BadRequestError) as raised:
        client.messages.create(**{**ASK, "max_tokens": 2000})
    prompt = client.messages.count_tokens(model="a", messages=ASK["messages"]).input_tokens
    told = raised.value.body["error"]["message"]
    assert f"input length and `max_tokens` exceed context limit: {prompt} + 2000 > 1024" in told
    around = client.messages.count_tokens(model="a", messages=[{"role": "user", "content": "x"}]).input_tokens
    for stream in (False, True):
        # By its tokens, by its length alone, and as long as the context itself.
        for length in (5000, 2_000_000, 1024 - (around - 1)):
            messages = [{"role": "user", "content": "x" * length}]
            with pytest.raises(anthropic.BadRequestError) as raised:
                client.messages.create(**{**ASK, "messages": messages}, stream=stream)
            told = raised.value.body["error"]["message"]
            found = re.search(r"prompt is too long: (\d+) tokens > (\d+) maximum", told)
            assert found, told
            assert int(found[1]) > int(found[2]) == 1024
