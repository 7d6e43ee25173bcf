"""Messages of a chat as clients send them, and as chat templates take them."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from manylora.server.api.inert import MESSAGE, PART, Passing, refused
from manylora.server.api.strict import Strict
from manylora.server.api.tool_schemas import ToolCall

MAX_CALLS = 1024


class TextPart(Strict):
    """A part of a message's content. Only text is served."""

    passing: ClassVar[Passing] = PART

    type: Literal["text"]
    text: str


class Message(Strict):
    """A message of a chat."""

    passing: ClassVar[Passing] = MESSAGE
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = Field(
        None, description="May be left out where an assistant called tools."
    )
    name: str | None = None
    reasoning_content: str | None = Field(None, description="What an assistant thought before it answered.")
    reasoning: str | None = Field(None, description="The same by vLLM's newer name.")
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] = Field(
        default_factory=list, description="What an assistant called."
    )
    tool_call_id: str | None = Field(None, description="Of a tool's message: which call it answers.")

    @field_validator("role", mode="before")
    @classmethod
    def _no_functions(cls, value: Any) -> Any:
        if value == "function":
            raise ValueError("function is the old name of tool: send role tool, with a tool_call_id")
        return value

    @model_validator(mode="after")
    def _fields_of_its_role(self) -> "Message":
        if self.content is None and not self.tool_calls:
            raise refused("content", "Field required")
        if self.tool_calls and self.role != "assistant":
            raise refused("tool_calls", "is an assistant's")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise refused("tool_call_id", "goes with role tool, and with no other")
        return self

    def for_template(self) -> dict[str, Any]:
        """Return what chat templates take: developer is system's newer name; parts are one text."""
        role = "system" if self.role == "developer" else self.role
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        more: dict[str, Any] = {
            "name": self.name,
            "reasoning_content": self.reasoning_content or self.reasoning,
            # No list at all where there were none: templates ask whether there is one.
            "tool_calls": [call.for_template() for call in self.tool_calls],
            "tool_call_id": self.tool_call_id,
        }
        return {"role": role, "content": text, **{key: value for key, value in more.items() if value}}


def for_template(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages as chat templates take them; a tool's says which tool it was, by its call."""
    names: dict[str | None, str] = {}
    found = []
    for message in messages:
        names |= {call.id: call.name for call in message.tool_calls}
        made = message.for_template()
        if message.role == "tool" and message.tool_call_id in names:
            made.setdefault("name", names[message.tool_call_id])
        found.append(made)
    return found
