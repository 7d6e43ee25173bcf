"""Tools as a request offers them: what they are called, what they take, and which of them may or must be called."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

INPUT = "input"
"""The one parameter by which templates are told of a custom tool."""


@dataclass(frozen=True, slots=True)
class InputGrammar:
    """What a custom tool's input must be."""

    syntax: Literal["lark", "regex"]
    definition: str


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that takes JSON, or a custom tool that takes text."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    """A JSON schema; None: it takes nothing."""
    strict: bool = False
    """Whether arguments are held to the schema even where the model calls of its own accord."""
    custom: bool = False
    grammar: InputGrammar | None = None
    """Of a custom tool's input; None: any text."""
    param: str = "tools"
    """Where the request says what it takes, as whoever sent it knows that place."""

    @property
    def schema(self) -> Mapping[str, Any]:
        """The JSON schema of its arguments."""
        if self.custom:
            text: dict[str, Any] = {"type": "string"}
            if self.grammar is not None and self.grammar.syntax == "regex":
                text["pattern"] = f"^(?:{self.grammar.definition})$"
            return {
                "type": "object",
                "properties": {INPUT: text},
                "required": [INPUT],
                "additionalProperties": False,
            }
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return self.parameters

    @property
    def held(self) -> bool:
        """Whether a call of it must be held to more than the format."""
        return self.strict or self.grammar is not None

    @property
    def raw(self) -> bool:
        """Whether its input stands as it is where JSON has a string: a grammar's text can't be told with escapes."""
        return self.grammar is not None and self.grammar.syntax == "lark"

    def for_template(self) -> dict[str, Any]:
        """Return it as chat templates take tools."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        if self.custom:
            function["parameters"] = {
                "type": "object",
                "properties": {INPUT: {"type": "string"}},
                "required": [INPUT],
            }
        else:
            function["parameters"] = self.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of a request, and how they may be used."""

    tools: Sequence[Tool] = ()
    mode: Literal["none", "auto", "required"] = "auto"
    """Whether the answer can't call, may, or must."""
    allowed: frozenset[str] | None = None
    """Names of those that may be called; None: all."""
    named: bool = False
    """Whether the one that is allowed was named by the request."""
    parallel: bool = True
    """Whether one answer may call several times."""
    by_name: Mapping[str, Tool] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_name", {tool.name: tool for tool in self.tools})

    @property
    def callable(self) -> tuple[Tool, ...]:
        """Those that may be called."""
        return tuple(tool for tool in self.tools if self.allowed is None or tool.name in self.allowed)

    @property
    def held(self) -> bool:
        """Whether a grammar must hold the answer."""
        if self.mode == "none":
            return False
        bound = self.mode == "required" or self.allowed is not None or not self.parallel
        return bound or any(tool.held for tool in self.callable)
