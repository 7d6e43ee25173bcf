"""Mixtures: several adapters with weights that act as one, y = W x + Σ wᵢ sᵢ Bᵢ Aᵢ x. Names and numbers only.

As text a mixture is ``sql:0.7+pirate:0.3``: ``+`` parts it, a part's weight follows its last colon, and a missing
weight is 1. Names may hold colons but neither ``+`` nor spaces: a string that is a known name is that name, and spaces
around a part don't matter.
"""

import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from manylora.adapters.errors import InvalidMixture
from manylora.adapters.names import LONGEST_ECHO, MAX_NAME_LENGTH

_NUMBER = re.compile(r"-?(\d{1,64}(\.\d{0,64})?|\.\d{1,64})(e-?\d{1,4})?|-?(nan|inf|infinity)", re.A | re.I)
"""A weight as text. Those that are not finite are numbers too: who writes one is told so."""
_CUT_WEIGHT = re.compile(r"(-?[\d.]{1,128}e)?", re.A | re.I)
"""What a ``+`` leaves before it of a weight that is written with one: ``+1``, ``1e+3``."""
LONGEST_PART = MAX_NAME_LENGTH + 160
"""Characters of a part as text: the longest name, a colon, the longest weight, and a few spaces."""


@dataclass(frozen=True, slots=True)
class MixturePart:
    """One adapter of a mixture."""

    adapter: str
    """Its name: whatever version that means when a request begins."""
    weight: float
    """Finite; a float32's value."""


def is_mixture(text: str, known: Callable[[str], bool]) -> bool:
    """Return whether ``text`` can only be meant as a mixture: parts, or a weight after a known name.

    An unknown name with a number after its last colon is an unknown name. No known name is a mixture.
    """
    if known(text):
        return False
    name, weight = _split(text, known)
    return "+" in text or (weight is not None and known(name))


def parse_mixture(text: str, known: Callable[[str], bool]) -> tuple[MixturePart, ...]:
    """Return the parts that ``text`` spells, in its order and with its zeros. Raises InvalidMixture."""
    found = []
    for piece in text.split("+"):
        name, weight = _split(piece.strip(), known)
        if not name:
            raise InvalidMixture(f"mixture {text[:LONGEST_ECHO]!r}: a part between '+' has no name")
        if weight is None and not known(name):
            _check_whole(name, known)
        found.append(MixturePart(name, part_weight(name, 1.0 if weight is None else weight)))
    return tuple(found)


def _check_whole(piece: str, known: Callable[[str], bool]) -> None:
    """Raise InvalidMixture for a known name with what a ``+`` has left of its weight."""
    name, colon, digits = piece.rpartition(":")
    if colon and _CUT_WEIGHT.fullmatch(digits) and known(name):
        raise InvalidMixture(
            f"part {piece[:LONGEST_ECHO]!r} has no whole weight after its colon; a weight is written without '+': "
            "1, 1e3"
        )


def part_weight(name: str, weight: float) -> float:
    """Return a weight as it is computed with, in float32. Raises InvalidMixture if that isn't finite."""
    single = _single(weight)
    if not math.isfinite(single):
        raise InvalidMixture(
            f"the weight of {name[:LONGEST_ECHO]!r} is {weight}: a weight is a finite number"
        )
    return single


def check_parts(parts: Sequence[MixturePart], most: int) -> None:
    """Raise InvalidMixture for no parts, more than ``most``, or the same part twice."""
    if not parts:
        raise InvalidMixture("a mixture has at least one part")
    if len(parts) > most:
        raise InvalidMixture(
            f"the mixture has {len(parts)} parts, at most {most} are served (--max-mixture-parts)"
        )
    seen: set[str] = set()
    for part in parts:
        if part.adapter in seen:
            raise InvalidMixture(
                f"{part.adapter!r} is in the mixture twice: give it once, with the sum of the weights"
            )
        seen.add(part.adapter)


def spell(parts: Sequence[MixturePart]) -> str:
    """Return parts as text that ``parse_mixture`` reads, unless a part with its weight happens to be a known name."""
    return "+".join(f"{part.adapter}:{_number(part.weight)}" for part in parts)


def are_same(some: Sequence[MixturePart], others: Sequence[MixturePart]) -> bool:
    """Return whether these are the same parts, in whatever order."""
    return Counter(some) == Counter(others)


def shortest(weight: float) -> float:
    """Return the number with the fewest digits that is this float32: 0.7 as it was sent, not 0.699999988079071."""
    return float(_number(weight))


def _number(weight: float) -> str:
    """Return the shortest text of a float32, without the ``+`` of an exponent."""
    # Rounded to a few digits, the largest ones are beyond a float32.
    digits = next(text for n in range(1, 10) if _single(float(text := f"{weight:.{n}g}")) == weight)
    return digits.replace("e+", "e")


def _single(value: float) -> float:
    """Return the nearest float32, infinity beyond the largest."""
    try:
        single: float = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.inf
    return single


def _split(piece: str, known: Callable[[str], bool]) -> tuple[str, float | None]:
    """Return a part's name and weight; None: it has none."""
    if known(piece):
        return piece, None
    name, colon, digits = piece.rpartition(":")
    if not colon:
        return piece, None
    return (name, float(digits)) if _NUMBER.fullmatch(digits) else (piece, None)
