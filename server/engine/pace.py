"""How many prompt tokens a step takes beside running streams, so that these hardly notice: from measured times.

A step's time is taken as that of its decodes plus so much for each prompt token. Both are averages over the last
steps, so that the bound follows the machine and what else runs on it. What decodes take is kept by their number: while
few streams run and many come in, a step may take what one of all of them will.
"""

from dataclasses import dataclass

WAIT = 1.8
"""How many times as long as a step of decodes alone a step may take that computes prompts beside them. Two are
promised; steps differ from their averages."""
LEAST = 16
"""Prompt tokens that a step always takes: a prompt goes on whatever was measured."""
MEMORY = 16
"""Steps that an average reaches back, about."""
TOLD = 8
"""Prompt tokens from which on a step says what they cost."""
MIXED = 16
"""Steps of decodes and prompts in a row after which one of decodes alone says again what these take."""


@dataclass(frozen=True, slots=True)
class Tempo:
    """How the engine's steps follow each other."""

    steps: int
    """So many have been run."""
    seconds: float
    """What one takes that only decodes."""


class Pace:
    """The engine notes what steps took; the scheduler asks what the next may take."""

    def __init__(self, most: int) -> None:
        """``most``: prompt tokens of a step, where nothing has been measured or it is fast enough."""
        self._most = most
        self._decodes: float | None = None
        self._by_number: dict[int, float] = {}
        """Of steps of 1, 2 to 3, 4 to 7, … decodes."""
        self._token: float | None = None
        self._mixed = 0
        self._steps = 0

    @property
    def tempo(self) -> Tempo:
        """How steps follow each other."""
        return Tempo(self._steps, self._decodes or 0.0)

    def note(self, decodes: int, prompt_tokens: int, seconds: float) -> None:
        """Note a step of so many decodes and prompt tokens."""
        self._steps += 1
        self._mixed = self._mixed + 1 if decodes and prompt_tokens else 0
        if not prompt_tokens:
            self._decodes = _average(self._decodes, seconds)
            size = decodes.bit_length()
            self._by_number[size] = _average(self._by_number.get(size), seconds)
        elif prompt_tokens >= TOLD:
            of_decodes = self._alone(decodes) if decodes else 0.0
            # Not below nothing: what the decodes took is an average.
            self._token = _average(self._token, max(0.0, seconds - of_decodes) / prompt_tokens)

    def beside_decodes(self, decodes: int, streams: int) -> int:
        """Return how many prompt tokens the next step may take beside so many decodes.

        ``streams``: how many run, with those whose prompts are computed.
        """
        if self._mixed >= MIXED:
            return 0
        if not self._decodes or not self._token:
            return self._most
        usual = self._alone(max(decodes, streams))
        fits = (WAIT * usual - min(self._alone(decodes), usual)) / self._token
        return int(max(LEAST, min(self._most, fits)))

    def _alone(self, decodes: int) -> float:
        """Return what a step of so many decodes takes, as far as that was measured."""
        return self._by_number.get(decodes.bit_length(), self._decodes or 0.0)


def _average(before: float | None, value: float) -> float:
    return value if before is None else before + (value - before) / MEMORY
