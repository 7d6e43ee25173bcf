"""Answers of chats as /openapi.json describes them; see answers.py."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from manylora.server.api.answer import Answer
from manylora.server.api.answers import Completionlike, Finish, Usage


class ChatToken(Answer):
    """A token and its log probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(ChatToken):
    """A token of the answer, with the likeliest in its place."""

    top_logprobs: list[ChatToken]


class ChatLogprobs(Answer):
    """Log probabilities of an answer's tokens."""

    content: list[ChatTokenLogprob] | None
    refusal: None


class FunctionCall(Answer):
    """A function's name, and its arguments: JSON, as the model wrote it."""

    name: str
    arguments: str


class CustomCall(Answer):
    """A custom tool's name, and its input."""

    name: str
    input: str


class MessageToolCall(Answer):
    """A call of a tool."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=False)

    id: str
    type: Literal["function", "custom"]
    function: FunctionCall | None = None
    custom: CustomCall | None = None


class ChatMessage(Answer):
    """An answer."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=False)

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    reasoning_content: str | None = Field(None, description="What was thought before.")
    tool_calls: list[MessageToolCall] = Field(default_factory=list)


class ChatChoice(Answer):
    """One of n answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish | Literal["tool_calls"]
    stop_reason: str | int | None


class ChatCompletion(Completionlike):
    """An answer to a chat."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class DeltaFunction(BaseModel):
    """More of a function's call: its name once, its arguments by and by."""

    name: str | None = None
    arguments: str | None = None


class DeltaCustom(BaseModel):
    """More of a custom tool's call."""

    name: str | None = None
    input: str | None = None


class DeltaToolCall(BaseModel):
    """More of a call; id, type and name come once."""

    index: int
    id: str | None = None
    type: Literal["function", "custom"] | None = None
    function: DeltaFunction | None = None
    custom: DeltaCustom | None = None


class ChatDelta(BaseModel):
    """What a step added to a message; empty in a choice's last chunk."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[DeltaToolCall] | None = None


class ChatChunkChoice(Answer):
    """What a step added to one of n answers."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Finish | Literal["tool_calls"] | None


class ChatCompletionChunk(Completionlike):
    """One event of a stream."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
