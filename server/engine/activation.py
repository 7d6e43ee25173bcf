"""From which token on which adapters act. Integers only; no torch.

An activated adapter (aLoRA, arXiv 2504.12397) acts from the last place in the prompt where its invocation begins; what
comes before is the base's own, keys and values included. Here that becomes stages of a sequence, found once, when its
prompt is there: the scheduler cuts chunks where one ends, so that all tokens of a row have the same adapters, and the
prefix cache knows blocks by the stages that they lie in.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

AdapterKey = tuple[tuple[int, float], ...]
"""What tells one adapted model from another: (adapter id, weight) pairs. Empty is the base."""
Regime = tuple[tuple[int, AdapterKey], ...]
"""What tells one stretch of tokens from another with the same ids: from which of them on which adapters act."""


@dataclass(frozen=True, slots=True)
class Stages:
    """Adapters by token: ``keys[i]`` act on tokens from ``starts[i]`` to before the next start, the last on all later.

    ``starts`` begin with 0 and rise. Who acts goes on to the end, so each key has all that the ones before it have.
    """

    starts: tuple[int, ...]
    keys: tuple[AdapterKey, ...]

    @classmethod
    def throughout(cls, adapters: AdapterKey) -> "Stages":
        """Return those of a sequence in which the same adapters act from its first token on."""
        return cls((0,), (adapters,))

    @property
    def last(self) -> AdapterKey:
        """What acts on all tokens that are generated."""
        return self.keys[-1]

    @property
    def base_until(self) -> int:
        """How many tokens at the beginning are the base's own, behind which adapters act; 0: none, or all of them."""
        return self.starts[1] if len(self.starts) > 1 and not self.keys[0] else 0

    def at(self, position: int) -> AdapterKey:
        """Return what acts on the token at ``position``."""
        return self.keys[bisect_right(self.starts, position) - 1]

    def alike(self, start: int, length: int) -> int:
        """Return how many of ``length`` tokens from ``start`` on have the first one's adapters."""
        later = bisect_right(self.starts, start)
        return length if later == len(self.starts) else min(length, self.starts[later] - start)

    def within(self, start: int, end: int) -> Regime:
        """Return what acts on tokens [start, end), counted from ``start``."""
        first = bisect_right(self.starts, start) - 1
        if first + 1 == len(self.starts):
            return ((0, self.keys[first]),)
        return tuple(
            (max(0, begin - start), key)
            for begin, key in zip(self.starts[first:], self.keys[first:], strict=True)
            if begin < end
        )


def stages_of(
    adapters: AdapterKey, prompt: Sequence[int], invocation_of: Callable[[int], tuple[int, ...]]
) -> Stages:
    """Return the stages of a prompt and what follows it; ``invocation_of`` an adapter's id: () if it always acts.

    An invocation that the prompt doesn't have activates nothing, what is generated later included: as peft's generate
    does (tuners/lora/variants.py, calculate_alora_offsets). Parts of a mixture act each from its own place on.
    """
    points: list[int | None] = []
    for adapter_id, _ in adapters:
        invocation = invocation_of(adapter_id)
        points.append(last_place(prompt, invocation) if invocation else 0)
    starts = sorted({0, *(point for point in points if point is not None)})
    keys = tuple(
        tuple(
            part for part, point in zip(adapters, points, strict=True) if point is not None and point <= start
        )
        for start in starts
    )
    return Stages(tuple(starts), keys)


def last_place(prompt: Sequence[int], invocation: Sequence[int]) -> int | None:
    """Return where the last occurrence of ``invocation`` in ``prompt`` begins; None: there is none."""
    ids = np.array(prompt, dtype=np.int64)
    places = np.arange(len(ids) - len(invocation) + 1)
    for offset, token_id in enumerate(invocation):
        if not len(places):
            return None
        places = places[ids[places + offset] == token_id]
    return int(places[-1]) if len(places) else None
