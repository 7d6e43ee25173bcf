"""Requests of /v1/messages as Anthropic's clients send them, Claude Code among them."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from manylora.server.api.inert import CLAUDE, CLAUDE_PART, TEXT_ONLY, Passing, refused
from manylora.server.api.mixture_fields import ModelFields
from manylora.server.api.strict import Strict
from manylora.server.api.structured import Schema
from manylora.server.api.template_variables import TemplateVariables
from manylora.server.api.tool_schemas import MAX_TOOLS, limited
from manylora.server.chat.tools import Tool, ToolUse

MAX_STOPS = 16
MAX_BLOCKS = 4096
"""Of a message."""
LongName = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,128}$")]
Effort = Literal["low", "medium", "high", "xhigh", "max"]


class _Open(Strict):
    """A body around whose fields others may stand: clients get new ones with each version."""

    model_config = ConfigDict(extra="ignore")
    passing: ClassVar[Passing] = CLAUDE_PART


class TextBlock(_Open):
    """A block of text."""

    type: str
    text: str | None = None

    @model_validator(mode="after")
    def _text(self) -> "TextBlock":
        if self.type != "text" or self.text is None:
            raise refused("type", f"{TEXT_ONLY} here, in blocks of the type text with a text")
        return self


Texts = str | Annotated[list[TextBlock], Field(max_length=MAX_BLOCKS, fail_fast=True)]
_FIELDS = {
    "text": ("text",),
    "thinking": ("thinking",),
    "redacted_thinking": (),
    "tool_use": ("id", "name", "input"),
    "tool_result": ("tool_use_id",),
}
"""The fields that a block of each type must have."""


class Block(_Open):
    """A part of a message: a text, a thought, a call of a tool or what that returned."""

    type: str = Field(description=f"One of {', '.join(_FIELDS)}.")
    text: str | None = None
    thinking: str | None = None
    id: str | None = Field(None, min_length=1)
    name: str | None = Field(None, min_length=1)
    input: dict[str, Any] | None = None
    tool_use_id: str | None = Field(None, min_length=1)
    content: Texts | None = None
    is_error: bool = False

    @model_validator(mode="after")
    def _fields_of_its_type(self) -> "Block":
        if self.type not in _FIELDS:
            raise refused("type", f"{TEXT_ONLY}: a block is one of {', '.join(_FIELDS)}")
        for name in _FIELDS[self.type]:
            if getattr(self, name) is None:
                raise refused(name, "Field required")
        return self


class Turn(_Open):
    """A message."""

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Block], Field(max_length=MAX_BLOCKS, fail_fast=True)]

    @model_validator(mode="after")
    def _blocks_of_its_role(self) -> "Turn":
        mine = {"user": {"text", "tool_result"}, "system": {"text"}}.get(self.role)
        for block in self.blocks:
            if (block.type not in mine) if mine else (block.type == "tool_result"):
                raise refused("content", f"a block of the type {block.type} isn't {self.role}'s")
        return self

    @property
    def blocks(self) -> Sequence[Block]:
        """Its content; a text is one block."""
        return [Block(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class ClientTool(_Open):
    """A tool. One of a type of Anthropic's own, which its servers run or its models know, is passed over."""

    type: str = "custom"
    name: LongName
    description: str | None = None
    input_schema: Schema | None = None
    strict: bool = False

    @field_validator("input_schema")
    @classmethod
    def _not_too_large(cls, value: Schema | None) -> Schema | None:
        return limited(value)

    @property
    def served(self) -> bool:
        """Whether a model here can be told of it."""
        return self.type == "custom"

    def tool(self, place: int) -> Tool:
        """Return it as templates, parsers and grammars know it; ``place`` is its place among the request's tools."""
        param = f"tools.{place}.input_schema"
        return Tool(self.name, self.description, self.input_schema, self.strict, param=param)


class Choice(_Open):
    """Whether tools may, or must, be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _a_name_where_it_belongs(self) -> "Choice":
        if (self.name is not None) != (self.type == "tool"):
            raise refused("name", "goes with type tool, and with no other")
        return self


class Thinking(_Open):
    """Whether the model is to think before it answers, and to tell it."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = Field(None, description="Isn't kept: max_tokens bounds all of the answer.")
    display: Literal["summarized", "omitted"] | None = Field(None, description='"omitted": it isn\'t told.')


class OutputFormat(_Open):
    """What the answer is to be."""

    type: Literal["json_schema"]
    schema_: Schema = Field(alias="schema")


class OutputConfig(_Open):
    """How the answer is to be."""

    effort: Effort | None = Field(None, description="Told to templates that know levels.")
    format: OutputFormat | None = None


class CountRequest(ModelFields):
    """POST /v1/messages/count_tokens: what the prompt is made of."""

    model_config = ConfigDict(extra="ignore")
    passing: ClassVar[Passing] = CLAUDE

    model: str = Field(min_length=1)
    messages: Annotated[list[Turn], Field(min_length=1, fail_fast=True)]
    system: Texts = ""
    tools: Annotated[list[ClientTool], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(
        default_factory=list
    )
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = Field(None, description="The older place of output_config.format.")
    chat_template_kwargs: TemplateVariables = Field(default_factory=dict)
    metadata: Any = Field(None, description="Its user_id says who asks, as user does.")

    @property
    def asker(self) -> str | None:
        """Who asks, as Anthropic has it."""
        said = self.metadata.get("user_id") if isinstance(self.metadata, dict) else None
        return said if isinstance(said, str) and said else super().asker

    @model_validator(mode="after")
    def _tools_agree(self) -> "CountRequest":
        names = [tool.name for tool in self.tools if tool.served]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise refused("tools", f"two of them have the name {twice!r}")
        choice = self.tool_choice
        if choice is not None and choice.type == "tool" and choice.name not in names:
            raise refused("tool_choice", f"there is no tool {choice.name!r} among tools")
        if choice is not None and choice.type == "any" and not names:
            raise refused("tool_choice", "goes with tools")
        return self

    @property
    def tool_use(self) -> ToolUse:
        """The tools and how they may be used."""
        tools = tuple(tool.tool(place) for place, tool in enumerate(self.tools) if tool.served)
        choice = self.tool_choice or Choice(type="auto")
        mode: Literal["none", "auto", "required"] = "required"
        if choice.type in ("auto", "none"):
            mode = "auto" if choice.type == "auto" else "none"
        allowed = None if choice.name is None else frozenset({choice.name})
        return ToolUse(
            tools, mode, allowed, parallel=allowed is None and not choice.disable_parallel_tool_use
        )

    @property
    def thinks(self) -> bool:
        """Whether it is to think: if that is said, as Anthropic has it."""
        return self.thinking is not None and self.thinking.type != "disabled"


class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: int = Field(ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, description="0 and -1: no limit.")
    stop_sequences: Annotated[
        list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOPS, fail_fast=True)
    ] = Field(default_factory=list)
    stream: bool = False
    priority: int = Field(0, ge=-(2**31), lt=2**31, description="Less begins sooner; see chats.")
