"""openai-python's usual program: chats, streams, parsed output, tools, responses, embeddings, files, batches."""

import time
from collections.abc import Callable
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.clients.programs.crew import LOOK_UP, QUESTION, SQL, URL, Person

ASK: Any = {"messages": [{"role": "user", "content": QUESTION}], "temperature": 0}


class GetCity(BaseModel):
    """Tell in which city somebody lives."""

    name: str


@pytest.fixture
def client() -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{URL}/v1", api_key="none")


def test_the_page(printed_by: Callable[[str], str]) -> None:
    assert printed_by("openai-python") == SQL


def test_chats(client: openai.OpenAI) -> None:
    chunks = client.chat.completions.create(model="sql", **ASK, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SQL
    with client.chat.completions.stream(model="json", **ASK, response_format=Person) as stream:
        kinds = {event.type for event in stream}
        assert stream.get_final_completion().choices[0].message.parsed == Person(name="Ada", city="London")
    assert {"chunk", "content.delta", "content.done"} <= kinds
    parsed = client.chat.completions.parse(model="json", **ASK, response_format=Person)
    assert parsed.choices[0].message.parsed == Person(name="Ada", city="London")
    told = [*ASK["messages"], parsed.choices[0].message, *ASK["messages"]]
    assert client.chat.completions.create(model="json", messages=told, max_tokens=1).choices


def test_a_loop_of_tools(client: openai.OpenAI) -> None:
    tools = [openai.pydantic_function_tool(GetCity, name="get_city")]
    told: list[Any] = [{"role": "user", "content": LOOK_UP}]
    ask: Any = {"model": "tools", "tools": tools, "temperature": 0}
    message = client.chat.completions.parse(messages=told, **ask).choices[0].message
    assert message.tool_calls is not None
    [call] = message.tool_calls
    assert call.function.parsed_arguments == GetCity(name="Ada")
    with client.chat.completions.stream(messages=told, **ask) as stream:
        again = stream.get_final_completion().choices[0].message
    assert [each.function.arguments for each in again.tool_calls or ()] == [call.function.arguments]
    told += [message, {"role": "tool", "tool_call_id": call.id, "content": "London"}]
    answer = client.chat.completions.create(messages=told, **ask).choices[0]
    assert (answer.message.content, answer.finish_reason) == ("The city of Ada is London.", "stop")


def test_responses(client: openai.OpenAI) -> None:
    ask: Any = {"model": "sql", "input": QUESTION, "temperature": 0}
    assert client.responses.create(**ask).output_text == SQL
    with client.responses.stream(**ask) as stream:
        assert stream.get_final_response().output_text == SQL
    parsed = client.responses.parse(**{**ask, "model": "json"}, text_format=Person)
    assert parsed.output_parsed == Person(name="Ada", city="London")
    told: Any = [{"role": "user", "content": QUESTION}, *parsed.output, {"role": "user", "content": QUESTION}]
    assert client.responses.create(model="json", input=told, max_output_tokens=16).output


def test_a_loop_of_tools_by_responses(client: openai.OpenAI) -> None:
    form = GetCity.model_json_schema()
    tools = [{"type": "function", "name": "get_city", "parameters": form, "strict": False}]
    told: list[Any] = [{"role": "user", "content": LOOK_UP}]
    ask: Any = {"model": "tools", "tools": tools, "temperature": 0}
    response = client.responses.create(input=told, **ask)
    [call] = [item for item in response.output if item.type == "function_call"]
    told += [*response.output, {"type": "function_call_output", "call_id": call.call_id, "output": "London"}]
    assert client.responses.create(input=told, **ask).output_text == "The city of Ada is London."


def test_completions(client: openai.OpenAI) -> None:
    prompt = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    ask: Any = {"model": "sql", "prompt": prompt, "max_tokens": 40, "temperature": 0}
    assert client.completions.create(**ask).choices[0].text == SQL
    streamed = client.completions.create(**ask, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == SQL


def test_embeddings(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="sql", input=["Ada", "Leo"])
    assert [len(each.embedding) for each in answer.data] == [128, 128]


def test_files_and_batches(client: openai.OpenAI) -> None:
    line = '{"custom_id": "one", "method": "POST", "url": "/v1/embeddings", "body": {"model": "sql", "input": "Ada"}}'
    file = client.files.create(file=("ask.jsonl", line.encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        time.sleep(0.02)
        batch = client.batches.retrieve(batch.id)
    assert batch.status == "completed"
    assert batch.output_file_id is not None
    assert '"custom_id":"one"' in client.files.content(batch.output_file_id).text.replace(" ", "")
    assert client.files.delete(file.id).deleted


def test_models_and_errors(client: openai.OpenAI) -> None:
    assert {"sql", "json", "pirate", "tools"} <= {model.id for model in client.models.list()}
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", **ASK)
