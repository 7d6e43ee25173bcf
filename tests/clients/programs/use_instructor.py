"""instructor's usual program: models of pydantic out of chats, in its modes, whole, partial and many."""

import asyncio
from collections.abc import Callable
from typing import Any, Literal

import instructor
import openai
import pytest
from pydantic import BaseModel, Field

from tests.clients.programs.crew import QUESTION, SQL, URL, Person

MESSAGES: Any = [{"role": "user", "content": QUESTION}]
ASK: dict[str, Any] = {"messages": MESSAGES, "temperature": 0, "max_tokens": 200, "max_retries": 0}


class City(BaseModel):
    """Somebody's city."""

    name: Literal["Ada", "Leo", "Yuki"]
    city: Literal["London", "Rome", "Tokyo"] = Field(description="where they live")


class Anything(BaseModel):
    """Whatever was found."""

    name: str | None = None


def client(mode: str) -> Any:
    return instructor.from_openai(
        openai.OpenAI(base_url=f"{URL}/v1", api_key="none"), mode=getattr(instructor.Mode, mode)
    )


def test_the_page(printed_by: Callable[[str], str]) -> None:
    assert printed_by("instructor") == SQL


@pytest.mark.parametrize("mode", ["TOOLS", "RESPONSES_TOOLS"])
def test_tools(mode: str) -> None:
    city = client(mode).create(model="tools", response_model=City, **ASK)
    assert isinstance(city, City)


def test_a_json_schema() -> None:
    person = client("JSON_SCHEMA").create(model="json", response_model=Person, **ASK)
    assert person.model_dump() == {"name": "Ada", "city": "London"}


@pytest.mark.parametrize("mode", ["JSON", "MD_JSON"])
def test_json(mode: str) -> None:
    # The schema stands in the prompt alone, where the demo's adapter has never seen one: any object will do.
    assert isinstance(client(mode).create(model="json", response_model=Anything, **ASK), Anything)


def test_partial_many_and_with_completion() -> None:
    partial = list(client("JSON_SCHEMA").create_partial(model="json", response_model=Person, **ASK))
    assert partial[-1].model_dump() == {"name": "Ada", "city": "London"}
    partial = list(client("TOOLS").create_partial(model="tools", response_model=City, **ASK))
    assert partial[-1].city is not None
    person, raw = client("JSON_SCHEMA").create_with_completion(model="json", response_model=Person, **ASK)
    assert (person.name, raw.choices[0].finish_reason) == ("Ada", "stop")


def test_from_provider() -> None:
    made = instructor.from_provider("openai/tools", base_url=f"{URL}/v1", api_key="none")
    assert isinstance(made.create(response_model=City, **ASK), City)
    several = instructor.from_provider(
        "openai/tools", base_url=f"{URL}/v1", api_key="none", async_client=True
    )
    assert isinstance(asyncio.run(several.create(response_model=City, **ASK)), City)
