"""LlamaIndex's usual program: chats, completions, streams, functions, structured output, an index of embeddings."""

import asyncio
from collections.abc import Callable
from typing import Any, Literal

from llama_index.core import Document, VectorStoreIndex
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai import OpenAIResponses
from llama_index.llms.openai_like import OpenAILike

from tests.clients.programs.crew import LOOK_UP, PROMPT, QUESTION, SQL, URL, City, Person


def get_city(name: Literal["Ada", "Leo", "Yuki"]) -> str:
    """Tell in which city somebody lives."""
    return {"Ada": "London"}.get(name, "nowhere")


def llm(model: str, **fields: Any) -> OpenAILike:
    given: dict[str, Any] = {"is_chat_model": True, "context_window": 1024, "max_tokens": 200, **fields}
    return OpenAILike(model=model, api_base=f"{URL}/v1", api_key="none", temperature=0, **given)


def test_the_page(printed_by: Callable[[str], str]) -> None:
    assert printed_by("LlamaIndex") == SQL


def test_chats() -> None:
    asked = [ChatMessage(role="user", content=QUESTION)]
    assert llm("sql").chat(asked).message.content == SQL
    assert llm("sql").complete(QUESTION).text == SQL
    assert "".join(chunk.delta or "" for chunk in llm("sql").stream_chat(asked)) == SQL
    assert asyncio.run(llm("sql").achat(asked)).message.content == SQL


def test_completions() -> None:
    plain = llm("sql", is_chat_model=False)
    assert plain.complete(PROMPT).text == SQL
    assert "".join(chunk.delta or "" for chunk in plain.stream_complete(PROMPT)) == SQL


def test_functions() -> None:
    model = llm("tools", is_function_calling_model=True)
    tool = FunctionTool.from_defaults(get_city)
    answer = model.chat_with_tools([tool], user_msg=QUESTION, tool_required=True)
    [call] = model.get_tool_calls_from_response(answer)
    assert call.tool_name == "get_city"
    result = model.predict_and_call([tool], user_msg=QUESTION, tool_required=True)
    assert result.response in ("London", "nowhere")
    streamed = list(model.stream_chat_with_tools([tool], user_msg=QUESTION, tool_required=True))
    [call] = model.get_tool_calls_from_response(streamed[-1])
    assert call.tool_name == "get_city"


def test_responses() -> None:
    where = {"api_base": f"{URL}/v1", "api_key": "none"}
    model = OpenAIResponses(model="sql", **where, temperature=0, context_window=1024, max_output_tokens=100)
    assert model.complete(QUESTION).text == SQL
    assert "".join(chunk.delta or "" for chunk in model.stream_complete(QUESTION)) == SQL


def test_an_agent() -> None:
    asked = []

    def get_city(name: str) -> str:
        """Tell in which city somebody lives."""
        asked.append(name)
        return "London"

    async def run() -> str:
        model = llm("tools", is_function_calling_model=True)
        return str(await FunctionAgent(tools=[get_city], llm=model).run(LOOK_UP))

    assert asyncio.run(run()) == "The city of Ada is London."
    assert asked == ["Ada"]


def test_structured_output() -> None:
    prompt = PromptTemplate("{question}")
    native = llm("json", should_use_structured_outputs=True)
    assert native.structured_predict(Person, prompt, question=QUESTION) == Person(name="Ada", city="London")
    model = llm("tools", is_function_calling_model=True)
    assert isinstance(model.structured_predict(City, prompt, question=QUESTION), City)
    told = model.as_structured_llm(City).chat([ChatMessage(role="user", content=QUESTION)])
    assert isinstance(told.raw, City)


def test_an_index() -> None:
    embeddings = OpenAILikeEmbedding(model_name="demo", api_base=f"{URL}/v1", api_key="none")
    assert len(embeddings.get_query_embedding("Ada")) == 128
    documents = [
        Document(text=f"{name} lives in {city}") for name, city in [("Ada", "London"), ("Leo", "Rome")]
    ]
    index = VectorStoreIndex.from_documents(documents, embed_model=embeddings)
    [found] = index.as_retriever(similarity_top_k=1).retrieve("Ada lives in London")
    assert found.text == "Ada lives in London"
    answer = index.as_query_engine(llm=llm("sql", max_tokens=20)).query(LOOK_UP)
    assert answer.source_nodes
