"""Tools as clients send them: what there is, which may or must be called, and what was called before."""

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import from_json

from manylora.server.api.inert import Passing, refused
from manylora.server.api.strict import Strict
from manylora.server.chat.tools import InputGrammar, Tool, ToolUse

MAX_TOOLS = 512
MAX_SCHEMA_CHARACTERS = 256 << 10
"""Of a tool's parameters, as JSON."""
NOTHING = Passing(inert={}, unread=frozenset())
_AROUND = Passing(inert={}, unread=frozenset({"cache_control", "defer_loading", "eager_input_streaming"}))
"""Around a tool: what others' clients say of caches."""
_AROUND_CALL = Passing(inert={}, unread=frozenset({"index", "provider_specific_fields", "extra_content"}))
"""Around a call, as clients send back what they got, from here or elsewhere."""
_IN_CALL = Passing(inert={}, unread=frozenset({"parsed_arguments"}))
"""What OpenAI's clients made of the arguments, which they send back with them."""
Name = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]


def limited(schema: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a tool's schema. Raises ValueError for one that is too large or too deep."""
    try:
        size = len(json.dumps(schema))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if size > MAX_SCHEMA_CHARACTERS:
        raise ValueError(f"it has {size} characters as JSON, at most {MAX_SCHEMA_CHARACTERS} are read")
    return schema


class FunctionSpec(Strict):
    """A function that the model may call."""

    passing: ClassVar[Passing] = NOTHING

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema; left out: it takes nothing.")
    strict: bool = Field(False, description="Hold the arguments to the schema, whenever it is called.")

    @field_validator("parameters")
    @classmethod
    def _not_too_large(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return limited(value)


class GrammarSpec(Strict):
    """A grammar of a custom tool's input."""

    passing: ClassVar[Passing] = NOTHING

    syntax: Literal["lark", "regex"]
    definition: str = Field(min_length=1, max_length=64 << 10)


class InputFormat(Strict):
    """What a custom tool's input is."""

    passing: ClassVar[Passing] = NOTHING

    type: Literal["text", "grammar"]
    grammar: GrammarSpec | None = None

    @model_validator(mode="after")
    def _grammar_where_it_belongs(self) -> "InputFormat":
        if (self.grammar is None) == (self.type == "grammar"):
            raise refused("grammar", "goes with type grammar, and with no other")
        return self


class CustomSpec(Strict):
    """A tool that takes text, not JSON."""

    passing: ClassVar[Passing] = NOTHING

    name: Name
    description: str | None = None
    format: InputFormat | None = None


class ToolSpec(Strict):
    """A tool."""

    passing: ClassVar[Passing] = _AROUND

    type: Literal["function", "custom"]
    function: FunctionSpec | None = None
    custom: CustomSpec | None = None

    @model_validator(mode="after")
    def _as_its_type_says(self) -> "ToolSpec":
        _one_of_its_type(self)
        return self

    @property
    def name(self) -> str:
        """What it is called by."""
        spec = self.custom if self.function is None else self.function
        assert spec is not None
        return spec.name

    def tool(self, place: int) -> Tool:
        """Return it as templates, parsers and grammars know it; ``place`` is its place among the request's tools."""
        if self.custom is not None:
            grammar = None if self.custom.format is None else self.custom.format.grammar
            held = None if grammar is None else InputGrammar(grammar.syntax, grammar.definition)
            param = f"tools.{place}.custom.format"
            return Tool(self.custom.name, self.custom.description, custom=True, grammar=held, param=param)
        function = self.function
        assert function is not None
        param = f"tools.{place}.function.parameters"
        return Tool(function.name, function.description, function.parameters, function.strict, param=param)


class Named(Strict):
    """A tool by its name."""

    passing: ClassVar[Passing] = NOTHING

    name: Name


class ToolByName(Strict):
    """One of the request's tools."""

    passing: ClassVar[Passing] = NOTHING

    type: Literal["function", "custom"]
    function: Named | None = None
    custom: Named | None = None

    @model_validator(mode="after")
    def _as_its_type_says(self) -> "ToolByName":
        _one_of_its_type(self)
        return self

    @property
    def name(self) -> str:
        """Its name."""
        named = self.custom if self.function is None else self.function
        assert named is not None
        return named.name


class AllowedTools(Strict):
    """Those of the request's tools that may be called."""

    passing: ClassVar[Passing] = NOTHING

    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolByName], Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True)]


class ToolChoice(Strict):
    """Which tool must, or which may, be called."""

    passing: ClassVar[Passing] = NOTHING

    type: Literal["function", "custom", "allowed_tools"]
    function: Named | None = None
    custom: Named | None = None
    allowed_tools: AllowedTools | None = None

    @model_validator(mode="after")
    def _as_its_type_says(self) -> "ToolChoice":
        _one_of_its_type(self)
        return self


def _one_of_its_type(body: ToolSpec | ToolByName | ToolChoice) -> None:
    """Refuse a body that hasn't the field that its type names, or has another's."""
    fields = [name for name in ("function", "custom", "allowed_tools") if name in type(body).model_fields]
    for name in fields:
        if (getattr(body, name) is not None) != (name == body.type):
            raise refused(name, f"a body of the type {body.type} has {body.type}, and nothing else")


class ToolFields(Strict):
    """Tools, and how they may be used."""

    tools: Annotated[list[ToolSpec], Field(max_length=MAX_TOOLS, fail_fast=True)] = Field(
        default_factory=list
    )
    tool_choice: Literal["none", "auto", "required"] | ToolChoice = "auto"
    parallel_tool_calls: bool = Field(True, description="Whether an answer may call several times.")

    @model_validator(mode="after")
    def _choice_of_what_is_there(self) -> "ToolFields":
        names = [spec.name for spec in self.tools]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise refused("tools", f"two of them have the name {twice!r}")
        if not names and (self.tool_choice == "required" or isinstance(self.tool_choice, ToolChoice)):
            raise refused("tool_choice", "goes with tools")
        missing = next((name for name in sorted(self._chosen or ()) if name not in names), None)
        if missing is not None:
            raise refused("tool_choice", f"there is no tool {missing!r} among tools")
        return self

    @property
    def _chosen(self) -> frozenset[str] | None:
        choice = self.tool_choice
        if not isinstance(choice, ToolChoice):
            return None
        if choice.allowed_tools is not None:
            return frozenset(each.name for each in choice.allowed_tools.tools)
        named = choice.custom if choice.function is None else choice.function
        assert named is not None
        return frozenset({named.name})

    @property
    def tool_use(self) -> ToolUse:
        """The tools and how they may be used."""
        choice = self.tool_choice
        named = isinstance(choice, ToolChoice) and choice.allowed_tools is None
        mode: Literal["none", "auto", "required"]
        if not isinstance(choice, ToolChoice):
            mode = choice
        else:
            mode = "required" if choice.allowed_tools is None else choice.allowed_tools.mode
        return ToolUse(
            tools_of(self.tools),
            mode,
            self._chosen,
            named=named,
            # Whoever names a tool wants it called, once.
            parallel=self.parallel_tool_calls and not named,
        )


def tools_of(specs: Sequence[ToolSpec]) -> tuple[Tool, ...]:
    """Return the tools."""
    return tuple(spec.tool(place) for place, spec in enumerate(specs))


class FunctionCalled(Strict):
    """A function that was called."""

    passing: ClassVar[Passing] = _IN_CALL

    name: str = Field(min_length=1)
    arguments: str = Field("", description="JSON: an object.")

    @field_validator("arguments")
    @classmethod
    def _an_object(cls, value: str) -> str:
        decoded_arguments(value)
        return value


class CustomCalled(Strict):
    """A custom tool that was called."""

    passing: ClassVar[Passing] = NOTHING

    name: str = Field(min_length=1)
    input: str = ""


class ToolCall(Strict):
    """A call of an earlier answer."""

    passing: ClassVar[Passing] = _AROUND_CALL

    id: str = Field(min_length=1)
    type: Literal["function", "custom"] = "function"
    function: FunctionCalled | None = None
    custom: CustomCalled | None = None

    @model_validator(mode="after")
    def _as_its_type_says(self) -> "ToolCall":
        if (self.function is None) == (self.type == "function"):
            raise refused("function", "goes with type function, and with no other")
        if (self.custom is None) == (self.type == "custom"):
            raise refused("custom", "goes with type custom, and with no other")
        return self

    @property
    def name(self) -> str:
        """What was called."""
        called = self.custom if self.function is None else self.function
        assert called is not None
        return called.name

    def for_template(self) -> dict[str, Any]:
        """Return what chat templates take, which look into the arguments."""
        if self.function is not None:
            arguments = decoded_arguments(self.function.arguments)
        else:
            assert self.custom is not None
            arguments = {"input": self.custom.input}
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


def decoded_arguments(text: str) -> dict[str, Any]:
    """Return a call's arguments, an object; no text: none. Raises ValueError."""
    if not text.strip():
        return {}
    try:
        found = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise ValueError(f"the arguments are not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"the arguments must be a JSON object, not {type(found).__name__}")
    return found
