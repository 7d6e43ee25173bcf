"""Answers of /v1/messages as /openapi.json describes them; see answers.py."""

from typing import Any, Literal

from pydantic import ConfigDict, Field

from manylora.server.api.answer import Answer
from manylora.server.api.answers import ServedPart
from manylora.server.api.auto_answers import AUTO_MEANING, AutoChoice

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class _MayBeLeftOut(Answer):
    model_config = ConfigDict(json_schema_serialization_defaults_required=False)


class MessageUsage(Answer):
    """Tokens of a request; input_tokens are without those of the cache."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageBlock(_MayBeLeftOut):
    """A text, a thought or a call of a tool."""

    type: Literal["text", "thinking", "tool_use"]
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None


class AnthropicMessage(_MayBeLeftOut):
    """An answer."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[MessageBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage
    adapters: list[ServedPart] = Field(default_factory=list, description="A mixture's parts.")
    auto: AutoChoice | None = Field(None, description=AUTO_MEANING)


class BlockDelta(_MayBeLeftOut):
    """More of a block, or why a message ended."""

    type: Literal["text_delta", "thinking_delta", "input_json_delta"] | None = None
    text: str | None = None
    thinking: str | None = None
    partial_json: str | None = None
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None


class MessageEvent(_MayBeLeftOut):
    """One event of a stream."""

    type: Literal[
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    message: AnthropicMessage | None = None
    index: int | None = None
    content_block: MessageBlock | None = None
    delta: BlockDelta | None = None
    usage: MessageUsage | None = None


class CountedTokens(Answer):
    """How long a prompt is."""

    input_tokens: int
