"""How many prompt tokens a step takes beside running streams, so that these hardly notice: from measured times.

A step's time is taken as that of its decodes plus what its chunks of prompts take (prompt_cost.py). Both are averages
over the last steps, so that the bound follows the machine and what else runs on it. What decodes take is kept by their
number: while few streams run and many wait, a step may take what one of all of them will. Else a burst would come in so
slowly that its first streams end before its last begin, and what a step of all takes would never be measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from manylora.server.engine.prompt_cost import MEMORY, Chunk, PromptCost

WAIT = 1.7
"""How many times as long as a step of decodes alone a step may take that computes prompts beside them. Two are
promised; steps differ from their averages."""
LEAST = 4
"""Prompt tokens that a step always takes: a prompt goes on whatever was measured. Behind a long context each may
take as long as a few decodes."""
MIXED = 16
"""Steps of decodes and prompts in a row after which one of decodes alone says again what these take."""

CROWD = 2.5
"""Times what a step of its decodes alone takes that a step of all who wait may be reckoned to take: streams that run
are not to wait longer for a burst, however large it is."""
FURTHER = 3
"""Times that the most decodes which were measured may be doubled to say what more of them take."""

AWAITED, UNAWAITED = 0.5, 0.1
"""Of a step of decodes: what the arena may be changed in before it, for adapters that a request waits for or nobody."""
UNKNOWN = 0.001
"""Seconds that a step is taken to take before one was measured."""


@dataclass(frozen=True, slots=True)
class Tempo:
    """How the engine's steps follow each other."""

    steps: int
    """So many have been run."""
    seconds: float
    """What one takes that only decodes."""


class Allowance:
    """What prompts may still take of a step."""

    def __init__(self, cost: PromptCost, seconds: float, least: int = LEAST) -> None:
        """``least``: tokens that the first of them may have however long they take; 0: none begins."""
        self._cost = cost
        self._seconds = seconds
        self._least = least
        self._taken = False

    @classmethod
    def everything(cls) -> "Allowance":
        """Return that of a step that nobody waits for."""
        return cls(PromptCost(), 0.0)

    @property
    def spent(self) -> bool:
        """Whether too little is left to begin a chunk: each has its adapter's weights to read."""
        return self._cost.tokens(0, self._seconds) < LEAST if self._taken else not self._least

    def tokens(self, start: int) -> int:
        """Return how many tokens a chunk that begins there may have."""
        return max(0 if self._taken else self._least, self._cost.tokens(start, self._seconds))

    def take(self, start: int, length: int) -> None:
        """Note a chunk."""
        self._taken = True
        self._seconds -= self._cost.seconds(start, length)

    def give_back(self, start: int, length: int) -> None:
        """Note that a chunk is left out after all."""
        self._seconds += self._cost.seconds(start, length)


class Pace:
    """The engine notes what steps took; the scheduler asks what the next may take."""

    def __init__(self) -> None:
        self._decodes: float | None = None
        self._by_number: dict[int, float] = {}
        """Of steps of 1, 2 to 3, 4 to 7, … decodes."""
        self._prompts = PromptCost()
        self._mixed = 0
        self._steps = 0

    @property
    def tempo(self) -> Tempo:
        """How steps follow each other."""
        return Tempo(self._steps, self._decodes or 0.0)

    def for_arena(self, *, awaited: bool) -> float:
        """Return the seconds for which those who decode may wait for the arena, before each step."""
        return (AWAITED if awaited else UNAWAITED) * (self._decodes or UNKNOWN)

    def note(self, decodes: int, chunks: Sequence[Chunk], seconds: float) -> None:
        """Note a step of so many decodes and these chunks of prompts."""
        self._steps += 1
        self._mixed = self._mixed + 1 if decodes and chunks else 0
        if not chunks:
            self._decodes = _average(self._decodes, seconds)
            size = decodes.bit_length()
            self._by_number[size] = _average(self._by_number.get(size), seconds)
        else:
            self._prompts.note(chunks, seconds - (self._alone(decodes) if decodes else 0.0))

    def beside_decodes(self, decodes: int, streams: int) -> Allowance:
        """Return what prompts may take of the next step beside so many decodes.

        ``streams``: how many will run, with those whose prompts are computed or wait for it.
        """
        if self._mixed >= MIXED:
            return Allowance(self._prompts, 0.0, least=0)
        if not self._decodes or not self._prompts.measured:
            return Allowance.everything()
        alone = self._alone(decodes)
        usual = min(self._expected(max(decodes, streams)), CROWD * alone)
        seconds = WAIT * usual - min(alone, usual)
        # Where a step with a prompt takes long by itself, streams wait for it whatever the prompt's length: what it may
        # take again for its tokens makes such steps few.
        of_step = self._prompts.of_step
        return Allowance(self._prompts, max(seconds - of_step, of_step))

    def _alone(self, decodes: int) -> float:
        """Return what a step of so many decodes takes; of a number that was never measured, what the next one takes."""
        return self._by_number.get(self._nearest(decodes), 0.0)

    def _expected(self, decodes: int) -> float:
        """Return what a step of so many decodes will take: more than one of the most that was measured."""
        nearest = self._nearest(decodes)
        # Half of a step is taken to be the weights', which are read once, and half its rows'.
        more = min(FURTHER, max(0, decodes.bit_length() - nearest))
        return self._by_number[nearest] * (1 + (1 << more)) / 2

    def _nearest(self, decodes: int) -> int:
        """Return the measured number that is next to this one, the smaller of two; as in ``_by_number``."""
        size = decodes.bit_length()
        return min(self._by_number, key=lambda each: (abs(each - size), each), default=size)


def _average(before: float | None, value: float) -> float:
    return value if before is None else before + (value - before) / MEMORY
