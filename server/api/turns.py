"""Conversations that come as blocks or items, as the turns that chat templates take.

/v1/messages and /v1/responses tell a call, its result or a thought as things of their own; a template wants an
assistant's turn with all of its parts.
"""

from collections.abc import Mapping
from typing import Any

BETWEEN = "\n\n"
"""Between the texts of turns that become one."""


class Turns:
    """Gathers what was said, thought, called and returned, in its order."""

    def __init__(self, *, joins: bool = False) -> None:
        """``joins``: turns of one role that follow each other are one; those of the system always are."""
        self.done: list[dict[str, Any]] = []
        """Turns as chat templates take them."""
        self._joins = joins
        self._names: dict[str, str] = {}

    def said(self, role: str, text: str) -> None:
        """Add what somebody said: system, user or assistant."""
        last = self._last(role)
        if last is None or last.get("tool_calls"):
            self.done.append({"role": role, "content": text})
        elif not last["content"]:
            last["content"] = text
        elif self._joins or role == "system":
            last["content"] += BETWEEN + text
        else:
            self.done.append({"role": role, "content": text})

    def thought(self, text: str) -> None:
        """Add what the assistant thought before it said or called something."""
        last = self._last("assistant")
        if last is None or last["content"] or last.get("tool_calls"):
            last = {"role": "assistant", "content": ""}
            self.done.append(last)
        last["reasoning_content"] = last.get("reasoning_content", "") + text

    def called(self, call_id: str, name: str, arguments: Mapping[str, Any]) -> None:
        """Add a call to the assistant's turn."""
        last = self._last("assistant")
        if last is None:
            last = {"role": "assistant", "content": ""}
            self.done.append(last)
        call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        last.setdefault("tool_calls", []).append(call)
        self._names[call_id] = name

    def returned(self, call_id: str, text: str) -> None:
        """Add what a call returned."""
        turn = {"role": "tool", "content": text, "tool_call_id": call_id}
        if call_id in self._names:
            turn["name"] = self._names[call_id]
        self.done.append(turn)

    def _last(self, role: str) -> dict[str, Any] | None:
        """Return the last turn if it is that role's."""
        return self.done[-1] if self.done and self.done[-1]["role"] == role else None
