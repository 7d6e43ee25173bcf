"""Where work on texts is done, as far as tokenizers need to know, and which texts are long."""

from collections.abc import Callable
from typing import Protocol, TypeVar

Result = TypeVar("Result")
LONG = 1 << 16
"""Characters beyond which texts are long: half a second's work where they are the worst."""


class Lane(Protocol):
    """Threads for work on texts."""

    async def run(self, work: Callable[[], Result], characters: int) -> Result:
        """Return what ``work`` on so many characters does. Raises QueueFull."""
        ...
