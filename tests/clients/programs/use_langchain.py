"""LangChain's usual program: chats, streams, tools, structured output, embeddings, batches."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

from tests.clients.programs.crew import LOOK_UP, QUESTION, SQL, TABLE, URL, City, Name, Person


@tool
def get_city(name: Name) -> str:
    """Tell in which city somebody lives."""
    return {"Ada": "London"}.get(name, "nowhere")


def chat(model: str, **fields: Any) -> ChatOpenAI:
    return ChatOpenAI(model=model, base_url=f"{URL}/v1", api_key="none", temperature=0, **fields)


def test_the_page(printed_by: Callable[[str], str]) -> None:
    assert printed_by("LangChain") == SQL


def test_invoke() -> None:
    answer = chat("sql").invoke(QUESTION)
    assert answer.content == SQL
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["total_tokens"] > answer.usage_metadata["output_tokens"] > 0


def test_stream() -> None:
    whole: Any = None
    pieces = []
    for chunk in chat("sql", stream_usage=True).stream(QUESTION):
        pieces.append(chunk.content)
        whole = chunk if whole is None else whole + chunk
    assert "".join(pieces) == whole.content == SQL
    assert len([piece for piece in pieces if piece]) > 1
    assert whole.usage_metadata["output_tokens"] > 0


def test_a_chain_in_parallel() -> None:
    prompt = ChatPromptTemplate.from_messages([("user", TABLE + "Which city does {name} have?")])
    chain = prompt | chat("sql") | StrOutputParser()
    names = ["Ada", "Leo", "Yuki"]
    expected = [SQL.replace("Ada", name) for name in names]
    assert chain.batch([{"name": name} for name in names]) == expected
    assert asyncio.run(chain.abatch([{"name": name} for name in names])) == expected


def test_a_conversation_with_a_system_prompt() -> None:
    told = [SystemMessage("Answer."), HumanMessage(QUESTION), AIMessage("London"), HumanMessage(QUESTION)]
    assert chat("sql", max_tokens=5).invoke(told).usage_metadata["output_tokens"] <= 5


def test_logprobs_and_stop() -> None:
    answer = chat("sql", stop=[" WHERE"], logprobs=True, top_logprobs=2).invoke(QUESTION)
    assert answer.content == SQL.split(" WHERE")[0]
    assert len(answer.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2


@pytest.mark.parametrize(
    ("method", "strict"),
    [
        ("json_schema", True),
        ("json_schema", None),
        ("function_calling", True),
        ("function_calling", None),
        ("json_mode", None),
    ],
)
def test_structured_output(method: str, strict: bool | None) -> None:
    model, form = ("json", Person) if method != "function_calling" else ("tools", City)
    reader = chat(model, max_tokens=200).with_structured_output(form, method=method, strict=strict)
    person = reader.invoke(QUESTION)
    assert isinstance(person, form)
    if method != "function_calling":
        assert person == Person(name="Ada", city="London")


def test_structured_output_with_the_raw_answer() -> None:
    reader = chat("json").with_structured_output(Person, include_raw=True)
    told = reader.invoke(QUESTION)
    assert told["parsed"] == Person(name="Ada", city="London")
    assert told["parsing_error"] is None
    streamed = list(chat("json").with_structured_output(Person).stream(QUESTION))
    assert streamed[-1] == told["parsed"]


def test_a_forced_tool() -> None:
    for choice in ("required", "any", "get_city"):
        model = chat("tools", max_tokens=200).bind_tools([get_city], tool_choice=choice)
        answer = model.invoke(QUESTION)
        [call] = answer.tool_calls
        assert call["name"] == "get_city"
        assert isinstance(call["args"]["name"], str)
        result = get_city.invoke(call)
        assert isinstance(result, ToolMessage)


@pytest.mark.parametrize("responses", [False, True])
def test_a_loop_of_tools(responses: bool) -> None:
    model = chat("tools", use_responses_api=responses).bind_tools([get_city])
    told: list[Any] = [HumanMessage(LOOK_UP)]
    answer = model.invoke(told)
    assert answer.tool_calls
    while answer.tool_calls:
        told += [answer, *(get_city.invoke(call) for call in answer.tool_calls)]
        answer = model.invoke(told)
    assert answer.text == "The city of Ada is London."


def test_a_streamed_tool_call() -> None:
    whole: Any = None
    model = chat("tools", max_tokens=200).bind_tools([get_city], tool_choice="get_city", strict=True)
    for chunk in model.stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    [call] = whole.tool_calls
    assert (call["name"], list(call["args"])) == ("get_city", ["name"])


def test_responses() -> None:
    model = chat("sql", use_responses_api=True)
    answer = model.invoke(QUESTION)
    assert answer.text == SQL
    assert answer.usage_metadata is not None
    assert "".join(chunk.text for chunk in model.stream(QUESTION)) == SQL
    person = chat("json", use_responses_api=True).with_structured_output(Person).invoke(QUESTION)
    assert person == Person(name="Ada", city="London")
    again = model.invoke([HumanMessage(QUESTION), answer, HumanMessage(QUESTION)])
    assert isinstance(again, AIMessage)


def test_a_forced_tool_by_responses() -> None:
    model = chat("tools", use_responses_api=True).bind_tools([get_city], tool_choice="get_city")
    [call] = model.invoke(QUESTION).tool_calls
    assert call["name"] == "get_city"


@pytest.mark.parametrize("responses", [False, True])
def test_what_is_too_long(responses: bool) -> None:
    model = chat("sql", use_responses_api=responses)
    with pytest.raises(ContextOverflowError):
        model.invoke("Ada " * 2000)
    with pytest.raises(ContextOverflowError):
        list(model.stream("Ada " * 2000))


def test_embeddings() -> None:
    # Otherwise texts are cut into tokens of OpenAI's own tokenizer, which no other model has.
    embeddings = OpenAIEmbeddings(
        model="sql", base_url=f"{URL}/v1", api_key="none", check_embedding_ctx_length=False
    )
    one, two = embeddings.embed_documents(["Ada lives in London", "Leo lives in Rome"])
    assert len(one) == len(two) == 128
    assert one != two
    assert embeddings.embed_query("Ada lives in London") == pytest.approx(one, abs=1e-4)
