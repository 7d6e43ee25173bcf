"""Where work on texts is done, as far as tokenizers need to know."""

from collections.abc import Callable
from typing import Protocol, TypeVar

Result = TypeVar("Result")


class Lane(Protocol):
    """Threads for work on texts."""

    async def run(self, work: Callable[[], Result], characters: int) -> Result:
        """Return what ``work`` on so many characters does. Raises QueueFull."""
        ...
