"""One training example, whatever file and format it came from."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, Any]  # OpenAI's shape; chat templates may look at any field of it
Tool = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a row stands."""

    path: str
    line: int
    """Counted from 1: the line on which the row begins; in Parquet, which has no lines, the row."""
    row: int | None = None
    """Which row of the file it is, from 1, where other rows begin on the same line."""

    def __str__(self) -> str:
        place = f"{self.path}:{self.line}"
        return place if self.row is None else f"{place} (row {self.row:,})"


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation, or a plain text."""

    messages: tuple[Message, ...]
    """In OpenAI's shape: role, content (always a string), tool_calls (arguments as objects), ….
    Empty for plain text."""
    trained: tuple[bool, ...]
    """For every message, whether the model learns to write it. True for assistant messages alone."""
    tools: tuple[Tool, ...]
    """Descriptions of the functions that the assistant may call, in OpenAI's shape."""
    text: str | None
    """A plain text, all of it trained; None for a conversation."""
    source: Source
    unread: tuple[str, ...] = field(default=(), compare=False)
    """Names of the row's fields that nothing was read of. Known where the row was read, and not stored."""

    def to_json(self) -> str:
        """Write down all but the source. Equal contents give equal text, which is ASCII."""
        content = {
            "messages": self.messages,
            "trained": self.trained,
            "tools": self.tools,
            "text": self.text,
        }
        return json.dumps(content, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, source: Source) -> "Example":
        """Read what ``to_json`` wrote."""
        content = json.loads(text)
        return cls(
            messages=tuple(content["messages"]),
            trained=tuple(content["trained"]),
            tools=tuple(content["tools"]),
            text=content["text"],
            source=source,
        )
