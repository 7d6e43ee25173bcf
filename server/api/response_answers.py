"""Answers of /v1/responses as /openapi.json describes them; see answers.py."""

from typing import Any, Literal

from pydantic import ConfigDict, Field

from manylora.server.api.answer import Answer
from manylora.server.api.answers import ServedPart
from manylora.server.api.auto_answers import AUTO_MEANING, AutoChoice
from manylora.server.api.chat_answers import ChatTokenLogprob

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class _MayBeLeftOut(Answer):
    model_config = ConfigDict(json_schema_serialization_defaults_required=False)


class ResponseContent(_MayBeLeftOut):
    """A text, or a thought."""

    type: Literal["output_text", "reasoning_text"]
    text: str
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[ChatTokenLogprob] = Field(default_factory=list)


class ResponseItem(_MayBeLeftOut):
    """A message, a thought or a call of a tool."""

    type: Literal["message", "reasoning", "function_call", "custom_tool_call"]
    id: str
    status: ItemStatus
    role: Literal["assistant"] | None = None
    content: list[ResponseContent] | None = None
    summary: list[Any] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    input: str | None = None


class ResponseFault(Answer):
    """What ended a response."""

    code: str
    message: str


class ResponseCachedTokens(Answer):
    """Of the prompt's tokens."""

    cached_tokens: int
    cache_write_tokens: int


class ResponseReasoningTokens(Answer):
    """Of the answer's tokens."""

    reasoning_tokens: int


class ResponseUsage(Answer):
    """Tokens of a request."""

    input_tokens: int
    input_tokens_details: ResponseCachedTokens
    output_tokens: int
    output_tokens_details: ResponseReasoningTokens
    total_tokens: int


class ModelResponse(_MayBeLeftOut):
    """A response; what the request said is said again."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseFault | None
    incomplete_details: dict[str, str] | None
    model: str
    output: list[ResponseItem]
    store: Literal[False]
    previous_response_id: None
    usage: ResponseUsage | None
    adapters: list[ServedPart] = Field(default_factory=list, description="A mixture's parts.")
    auto: AutoChoice | None = Field(None, description=AUTO_MEANING)


class ResponseEvent(_MayBeLeftOut):
    """One event of a stream."""

    type: str
    sequence_number: int
    response: ModelResponse | None = None
    output_index: int | None = None
    content_index: int | None = None
    item_id: str | None = None
    item: ResponseItem | None = None
    part: ResponseContent | None = None
    delta: str | None = None
    logprobs: list[ChatTokenLogprob] | None = None
    text: str | None = None
    arguments: str | None = None
    input: str | None = None
