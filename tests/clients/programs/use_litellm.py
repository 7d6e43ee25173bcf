"""LiteLLM's usual program: completions, streams, tools, embeddings, reranking, responses, messages, a router."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import litellm
import pytest

from tests.clients.programs.crew import LOOK_UP, PROMPT, QUESTION, SQL, URL, Person

WHERE: dict[str, Any] = {"api_base": f"{URL}/v1", "api_key": "none"}
ASK: dict[str, Any] = {**WHERE, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
# `openai/` and `hosted_vllm/` are LiteLLM's names of servers that speak OpenAI's API.
BOTH = pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
TOOL = {
    "type": "function",
    "function": {
        "name": "get_city",
        "description": "Tell in which city somebody lives.",
        "parameters": {
            "type": "object",
            "properties": {"name": {"enum": ["Ada", "Leo", "Yuki"]}},
            "required": ["name"],
        },
    },
}


def test_the_page(printed_by: Callable[[str], str]) -> None:
    assert printed_by("LiteLLM") == SQL


@BOTH
def test_completion(provider: str) -> None:
    answer = litellm.completion(f"{provider}/sql", **ASK, max_tokens=50, drop_params=True)
    assert answer.choices[0].message.content == SQL
    assert answer.usage.total_tokens > answer.usage.completion_tokens > 0
    answer = asyncio.run(litellm.acompletion(f"{provider}/sql", **ASK))
    assert answer.choices[0].message.content == SQL


@BOTH
def test_streams(provider: str) -> None:
    chunks = list(
        litellm.completion(f"{provider}/sql", **ASK, stream=True, stream_options={"include_usage": True})
    )
    whole = litellm.stream_chunk_builder(chunks)
    assert whole.choices[0].message.content == SQL
    assert whole.usage.completion_tokens > 0

    async def run() -> str:
        stream = await litellm.acompletion(f"{provider}/sql", **ASK, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(run()) == SQL


@BOTH
def test_a_forced_tool(provider: str) -> None:
    answer = litellm.completion(f"{provider}/tools", **ASK, tools=[TOOL], tool_choice="required")
    [call] = answer.choices[0].message.tool_calls
    assert call.function.name == "get_city"


@BOTH
@pytest.mark.parametrize("stream", [False, True])
def test_a_loop_of_tools(provider: str, stream: bool) -> None:
    ask: dict[str, Any] = {**WHERE, "temperature": 0, "tools": [TOOL], "max_tokens": 200}
    told: list[Any] = [{"role": "user", "content": LOOK_UP}]

    def answered() -> Any:
        answer = litellm.completion(f"{provider}/tools", messages=told, **ask, stream=stream)
        return litellm.stream_chunk_builder(list(answer)) if stream else answer

    message = answered().choices[0].message
    [call] = message.tool_calls
    told += [message, {"role": "tool", "tool_call_id": call.id, "content": "London"}]
    answer = answered()
    assert answer.choices[0].message.content == "The city of Ada is London."
    assert answer.choices[0].finish_reason == "stop"


@BOTH
def test_structured_output(provider: str) -> None:
    answer = litellm.completion(f"{provider}/json", **ASK, response_format=Person)
    assert Person.model_validate_json(answer.choices[0].message.content) == Person(name="Ada", city="London")


@BOTH
def test_embedding(provider: str) -> None:
    answer = litellm.embedding(f"{provider}/sql", input=["Ada", "Leo"], **WHERE)
    assert [len(each["embedding"]) for each in answer.data] == [128, 128]


def test_rerank() -> None:
    answer = litellm.rerank("hosted_vllm/demo", query="Ada", documents=["Ada", "Leo"], top_n=1, **WHERE)
    assert len(answer.results) == 1


def test_text_completion() -> None:
    answer = litellm.text_completion(
        model="text-completion-openai/sql", prompt=PROMPT, max_tokens=40, temperature=0, **WHERE
    )
    assert answer.choices[0].text == SQL


@BOTH
def test_responses(provider: str) -> None:
    answer = litellm.responses(model=f"{provider}/sql", input=QUESTION, temperature=0, **WHERE)
    assert answer.output[0].content[0].text == SQL
    events = list(
        litellm.responses(model=f"{provider}/sql", input=QUESTION, temperature=0, stream=True, **WHERE)
    )
    assert events[-1].response.output[0].content[0].text == SQL


def test_files_and_batches() -> None:
    where = {**WHERE, "custom_llm_provider": "openai"}
    line = b'{"custom_id": "one", "method": "POST", "url": "/v1/embeddings", "body": {"model": "sql", "input": "Ada"}}'
    file = litellm.create_file(file=("ask.jsonl", line), purpose="batch", **where)
    endpoint, window = "/v1/embeddings", "24h"
    batch = litellm.create_batch(completion_window=window, endpoint=endpoint, input_file_id=file.id, **where)
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        time.sleep(0.02)
        batch = litellm.retrieve_batch(batch_id=batch.id, **where)
    assert batch.status == "completed"
    assert b"embedding" in litellm.file_content(file_id=batch.output_file_id, **where).content


def test_anthropics_messages() -> None:
    where = {"api_base": URL, "api_key": "none"}
    answer = litellm.completion("anthropic/sql", **{**ASK, **where}, max_tokens=50)
    assert answer.choices[0].message.content == SQL


def test_errors() -> None:
    with pytest.raises(litellm.NotFoundError):
        litellm.completion("openai/nobody", **ASK)
    with pytest.raises(litellm.BadRequestError):
        litellm.completion("openai/sql", **ASK, max_tokens=-1)
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion("openai/sql", **{**ASK, "messages": [{"role": "user", "content": "Ada " * 2000}]})


def test_a_router() -> None:
    names = ("sql", "json")
    router = litellm.Router(
        model_list=[
            {"model_name": name, "litellm_params": {"model": f"openai/{name}", **WHERE}} for name in names
        ]
    )
    answer = router.completion("sql", messages=ASK["messages"], temperature=0)
    assert answer.choices[0].message.content == SQL
