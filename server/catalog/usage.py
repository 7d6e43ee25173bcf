"""How often each adapter and each named mixture was asked for since the server started, and when last.

Lives on the event loop. Adapters are counted by their ids, so each version has its own count.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from manylora.server.catalog.types import MIXTURE_LABEL, ResolvedModel, Used

MOST_REMEMBERED = 100_000
"""Counts that are kept: those used last. Ids are never used again, and nobody says which are gone for good."""


@dataclass(slots=True)
class _Count:
    requests: int = 0
    last: float = 0.0


class Usage:
    """Counts requests. ``now`` is Unix time."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._counts: dict[int | str, _Count] = {}
        """By an adapter's id or a mixture's name, the last used at the end."""

    def count(self, model: ResolvedModel, requests: int) -> None:
        """Note ``requests`` for a model: for a mixture's name, and for each adapter that has a say in it."""
        if model.parts and model.label != MIXTURE_LABEL:
            self._add(model.name, requests)
        for adapter_id, _ in model.adapters:
            self._add(adapter_id, requests)

    def of(self, adapter: int | str) -> Used:
        """Return the count of an adapter by its id, or of a mixture by its name."""
        found = self._counts.get(adapter)
        return Used() if found is None else Used(found.requests, int(found.last))

    def forget(self, mixture: str) -> None:
        """Begin again at 0 for a mixture's name, which is free now."""
        self._counts.pop(mixture, None)

    def _add(self, key: int | str, requests: int) -> None:
        found = self._counts.pop(key, None) or _Count()
        found.requests += requests
        found.last = self._now()
        self._counts[key] = found
        if len(self._counts) > MOST_REMEMBERED:
            del self._counts[next(iter(self._counts))]
