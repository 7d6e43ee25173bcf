"""pydantic-ai's usual program: agents with output types, tools and streams, by chats and by responses."""

import asyncio
from collections.abc import Callable
from typing import Any

import openai
import pytest
from pydantic_ai import Agent, Embedder, NativeOutput, RunContext
from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel
from pydantic_ai.exceptions import ModelContextWindowExceededError, ModelNotFoundError
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.clients.programs.crew import LOOK_UP, QUESTION, SQL, URL, City, Person

MODELS = [OpenAIChatModel, OpenAIResponsesModel]
BOTH = pytest.mark.parametrize("model", MODELS)


def provider() -> OpenAIProvider:
    # One for each: by default all of a process share a client, which is bound to the first event loop.
    return OpenAIProvider(openai_client=openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none"))


def agent(model: Any, adapter: str, **fields: Any) -> Agent[Any, Any]:
    settings = {"temperature": 0, "max_tokens": 200}
    return Agent(model(adapter, provider=provider()), model_settings=settings, **fields)


def test_the_page(printed_by: Callable[[str], str]) -> None:
    assert printed_by("pydantic-ai") == SQL


@BOTH
def test_a_text(model: Any) -> None:
    result = agent(model, "sql").run_sync(QUESTION)
    assert result.output == SQL
    assert result.usage.output_tokens > 0
    assert result.usage.input_tokens > 0
    again = agent(model, "sql", instructions="Answer.").run_sync(
        QUESTION, message_history=result.all_messages()
    )
    assert len(again.all_messages()) == 4


@BOTH
def test_a_stream(model: Any) -> None:
    async def run() -> tuple[list[str], str]:
        async with agent(model, "sql").run_stream(QUESTION) as stream:
            pieces = [piece async for piece in stream.stream_text(delta=True, debounce_by=None)]
            return pieces, await stream.get_output()

    pieces, output = asyncio.run(run())
    assert "".join(pieces) == output == SQL
    assert len(pieces) > 1


@BOTH
def test_an_output_that_is_json(model: Any) -> None:
    result = agent(model, "json", output_type=NativeOutput(Person)).run_sync(QUESTION)
    assert result.output == Person(name="Ada", city="London")


@BOTH
def test_an_output_that_is_a_tool(model: Any) -> None:
    result = agent(model, "tools", output_type=City).run_sync(QUESTION)
    assert isinstance(result.output, City)


@BOTH
def test_a_streamed_output(model: Any) -> None:
    async def run() -> list[Any]:
        async with agent(model, "tools", output_type=City).run_stream(QUESTION) as stream:
            return [each async for each in stream.stream_output(debounce_by=None)]

    assert isinstance(asyncio.run(run())[-1], City)


@BOTH
def test_errors(model: Any) -> None:
    with pytest.raises(ModelContextWindowExceededError):
        agent(model, "sql").run_sync("Ada " * 2000)
    with pytest.raises(ModelNotFoundError):
        agent(model, "nobody").run_sync(QUESTION)


def test_embeddings() -> None:
    embedder = Embedder(OpenAIEmbeddingModel("sql", provider=provider()))
    result = embedder.embed_documents_sync(["Ada lives in London", "Leo lives in Rome"])
    assert [len(each) for each in result.embeddings] == [128, 128]


@BOTH
def test_tools_that_are_called(model: Any) -> None:
    asked = []

    def get_city(context: RunContext[None], name: str) -> str:
        """Tell in which city somebody lives."""
        asked.append(name)
        return "London"

    knowing = agent(model, "tools", tools=[get_city])
    assert knowing.run_sync(LOOK_UP).output == "The city of Ada is London."

    async def run() -> str:
        async with agent(model, "tools", tools=[get_city]).run_stream(LOOK_UP) as stream:
            return str(await stream.get_output())

    assert asyncio.run(run()) == "The city of Ada is London."
    assert asked == ["Ada", "Ada"]
