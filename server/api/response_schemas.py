"""Requests of /v1/responses as OpenAI's clients send them, Codex among them."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from manylora.server.api.inert import INPUT_ITEM, RESPONSE, TEXT_ONLY, Passing, refused
from manylora.server.api.mixture_fields import ModelFields
from manylora.server.api.schemas import MAX_TOP_LOGPROBS
from manylora.server.api.strict import Strict
from manylora.server.api.structured import Schema
from manylora.server.api.template_variables import TemplateVariables
from manylora.server.api.tool_schemas import MAX_TOOLS, decoded_arguments, limited
from manylora.server.chat.tools import InputGrammar, Tool, ToolUse

LongName = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,128}$")]
_NAME = re.compile("[a-zA-Z0-9_-]{1,128}")
MAX_PARTS, MAX_ITEMS = 4096, 16384
MAX_INCLUDED = 64
LOGPROBS = "message.output_text.logprobs"
"""What asks for the log probabilities of a message."""
SERVED = ("function", "custom")
"""Types of tools that a model here can be told of; the others are passed over."""


class _Open(Strict):
    """A body around whose fields others may stand: clients get new ones with each version."""

    model_config = ConfigDict(extra="ignore")
    passing: ClassVar[Passing] = INPUT_ITEM


class InputPart(_Open):
    """A part of a text."""

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text", "refusal"]
    text: str = ""
    refusal: str = ""

    @field_validator("type", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        if value in ("input_image", "input_file", "input_audio"):
            raise ValueError(TEXT_ONLY)
        return value


Said = str | Annotated[list[InputPart], Field(max_length=MAX_PARTS, fail_fast=True)]
_FIELDS = {
    "message": ("role", "content"),
    "reasoning": (),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "custom_tool_call": ("call_id", "name", "input"),
    "custom_tool_call_output": ("call_id", "output"),
}
"""The fields that an item of each type must have."""


class InputItem(_Open):
    """A part of a conversation."""

    type: str = Field("message", description=f"One of {', '.join(_FIELDS)}.")
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Said | None = None
    summary: Said | None = None
    call_id: str | None = Field(None, min_length=1)
    name: str | None = Field(None, min_length=1)
    arguments: str | None = None
    input: str | None = None
    output: Said | None = None

    @field_validator("arguments")
    @classmethod
    def _an_object(cls, value: str | None) -> str | None:
        decoded_arguments(value or "")
        return value

    @model_validator(mode="after")
    def _fields_of_its_type(self) -> "InputItem":
        if self.type == "item_reference":
            raise refused("type", "no items are kept here: send the item itself")
        if self.type not in _FIELDS:
            raise refused("type", f"an item is one of {', '.join(_FIELDS)}")
        for name in _FIELDS[self.type]:
            if getattr(self, name) is None:
                raise refused(name, "Field required")
        return self


class InputGrammarSpec(_Open):
    """What a custom tool's input is."""

    type: Literal["text", "grammar"]
    syntax: Literal["lark", "regex"] | None = None
    definition: str | None = Field(None, min_length=1, max_length=64 << 10)

    @model_validator(mode="after")
    def _grammar_where_it_belongs(self) -> "InputGrammarSpec":
        for name in ("syntax", "definition"):
            if (getattr(self, name) is None) == (self.type == "grammar"):
                raise refused(name, "goes with type grammar, and with no other")
        return self


class ResponseTool(_Open):
    """A tool: a function, or a custom tool. Those of other types are passed over."""

    type: str
    name: str = ""
    description: str | None = None
    parameters: Schema | None = None
    strict: bool = False
    format: InputGrammarSpec | None = None

    @field_validator("parameters")
    @classmethod
    def _not_too_large(cls, value: Schema | None) -> Schema | None:
        return limited(value)

    @model_validator(mode="before")
    @classmethod
    def _others_say_what_they_like(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        return {"type": kind} if isinstance(kind, str) and kind not in SERVED else value

    @model_validator(mode="after")
    def _has_a_name(self) -> "ResponseTool":
        if self.served and not _NAME.fullmatch(self.name):
            raise refused("name", "it has 1 to 128 letters, digits, - and _")
        return self

    @property
    def served(self) -> bool:
        """Whether a model here can be told of it."""
        return self.type in SERVED

    def tool(self, place: int) -> Tool:
        """Return it as templates, parsers and grammars know it; ``place`` is its place among the request's tools."""
        if self.type == "function":
            param = f"tools.{place}.parameters"
            return Tool(self.name, self.description, self.parameters, self.strict, param=param)
        held = None
        if self.format is not None and self.format.syntax is not None:
            held = InputGrammar(self.format.syntax, self.format.definition or "")
        param = f"tools.{place}.format"
        return Tool(self.name, self.description, custom=True, grammar=held, param=param)


class ToolByName(_Open):
    """One of the request's tools."""

    type: Literal["function", "custom"]
    name: LongName


class ResponseChoice(_Open):
    """Which tool must, or which may, be called."""

    type: Literal["function", "custom", "allowed_tools"]
    name: LongName | None = None
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[list[ToolByName], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(
        default_factory=list
    )

    @model_validator(mode="after")
    def _as_its_type_says(self) -> "ResponseChoice":
        several = self.type == "allowed_tools"
        if (self.name is None) != several:
            raise refused("name", "goes with type function or custom")
        if (bool(self.tools) and self.mode is not None) != several:
            raise refused("tools", "goes, with a mode, with type allowed_tools")
        return self


class TextFormat(_Open):
    """What the answer is to be."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="Answers are held to the schema either way.")
    description: str | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> "TextFormat":
        if (self.schema_ is None) == (self.type == "json_schema"):
            raise refused("schema", "goes with type json_schema, and with no other")
        return self


class TextConfig(_Open):
    """How the answer is to be."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = Field(None, description="Can't be set.")


class ReasoningConfig(_Open):
    """How much is to be thought."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None, description='"none": templates are told not to think; levels are for templates that know them.'
    )
    summary: str | None = Field(None, description="There are none: what is thought is told as it is.")


class ResponsesRequest(ModelFields):
    """POST /v1/responses."""

    model_config = ConfigDict(extra="ignore")
    passing: ClassVar[Passing] = RESPONSE

    model: str = Field(min_length=1)
    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(
        default_factory=list
    )
    tool_choice: Literal["none", "auto", "required"] | ResponseChoice = "auto"
    parallel_tool_calls: bool = True
    reasoning: ReasoningConfig | None = None
    text: TextConfig | None = None
    metadata: dict[str, str] = Field(default_factory=dict, max_length=16)
    user: str | None = None
    stream: bool = False
    include: Annotated[list[str], Field(max_length=MAX_INCLUDED, fail_fast=True)] = Field(
        default_factory=list,
        description=f"{LOGPROBS}: those of a message's tokens. Others tell nothing here.",
    )
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_TOP_LOGPROBS, description="And so many of the best in each token's place."
    )
    store: bool = Field(True, description="Nothing is kept, and the answer says so.")
    previous_response_id: str | None = None
    chat_template_kwargs: TemplateVariables = Field(default_factory=dict)
    priority: int = Field(0, ge=-(2**31), lt=2**31, description="Less begins sooner; see chats.")

    @field_validator("previous_response_id")
    @classmethod
    def _nothing_is_kept(cls, value: str | None) -> str | None:
        if value is not None:
            raise ValueError("no answers are kept here: send the whole conversation in input")
        return value

    @model_validator(mode="after")
    def _choice_of_what_is_there(self) -> "ResponsesRequest":
        names = [tool.name for tool in self.served_tools]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise refused("tools", f"two of them have the name {twice!r}")
        missing = next((name for name in sorted(self._chosen or ()) if name not in names), None)
        if missing is not None:
            raise refused("tool_choice", f"there is no tool {missing!r} among tools")
        if self.tool_choice == "required" and not names:
            raise refused("tool_choice", "goes with tools")
        return self

    @property
    def logprobs(self) -> int | None:
        """How many of the best are told in the place of each of a message's tokens; None: nothing is told of it."""
        if LOGPROBS in self.include or self.top_logprobs:
            return self.top_logprobs or 0
        return None

    @property
    def served_tools(self) -> Sequence[ResponseTool]:
        """The tools that a model here can be told of."""
        return [tool for tool in self.tools if tool.served]

    @property
    def _chosen(self) -> frozenset[str] | None:
        choice = self.tool_choice
        if not isinstance(choice, ResponseChoice):
            return None
        return (
            frozenset(each.name for each in choice.tools) if choice.name is None else frozenset({choice.name})
        )

    @property
    def tool_use(self) -> ToolUse:
        """The tools and how they may be used."""
        choice = self.tool_choice
        named = isinstance(choice, ResponseChoice) and choice.name is not None
        mode: Literal["none", "auto", "required"] = "required"
        if not isinstance(choice, ResponseChoice):
            mode = choice
        elif choice.mode is not None:
            mode = choice.mode
        tools = tuple(tool.tool(place) for place, tool in enumerate(self.tools) if tool.served)
        return ToolUse(tools, mode, self._chosen, parallel=self.parallel_tool_calls and not named)
