"""What the evaluation needs of whoever generates: answers to conversations, by the base or by an adapter on it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

Message = Mapping[str, Any]
"""One chat message in OpenAI's shape: role, content, tool_calls, …"""


class Generate(Protocol):
    """Answers conversations greedily. `manylora.served_generation` does it with the engine that serves."""

    def __call__(
        self, conversations: Sequence[Sequence[Message]], adapter: Path | None, max_new_tokens: int
    ) -> list[str]:
        """Return the text that comes next in each conversation, in their order.

        ``adapter`` is the directory of a PEFT adapter; None is the base alone. Raises TrainingError.
        """
        ...
