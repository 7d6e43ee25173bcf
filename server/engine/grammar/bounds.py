"""Bounds of numbers that the library gets wrong, said otherwise.

Of a range inside one unit whose integer end is excluded, as 2 < x ≤ 2.25, it takes the integer all the same. The end is
moved in by a thousandth of the range: what is accepted is a part of what the schema allows.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from manylora.server.engine.grammar.grammar import GrammarRefused

_PARTS = 3
"""Decimals finer than the range."""
_LOWER, _UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")


def fractions_of(schemas: Iterable[Mapping[str, Any]]) -> tuple[float, ...]:
    """Return the bounds that are no integers, of schemas whose numbers are finite."""
    found: set[float] = set()
    for each in schemas:
        for word in (*_LOWER, *_UPPER):
            bound = each.get(word)
            if is_number(bound) and not float(bound).is_integer():
                found.add(float(bound))
    return tuple(sorted(found))


def move_in(schema: dict[str, Any], fractions: Iterable[float]) -> None:
    """Move a schema's excluded integer bounds in where a bound of ``fractions`` is less than 1 away; in place.

    Raises GrammarRefused where no number is fine enough.
    """
    for (plain, strict), inside in ((_LOWER, 1), (_UPPER, -1)):
        # The fourth draft has a flag beside the bound.
        bound = schema.get(plain) if schema.get(strict) is True else schema.get(strict)
        if not is_number(bound) or not float(bound).is_integer():
            continue
        room = min((gap for each in fractions if 0 < (gap := (each - bound) * inside) < 1), default=None)
        if room is None:
            continue
        moved: float = bound + inside * 10.0 ** (math.floor(math.log10(room)) - _PARTS)
        if moved == bound:
            raise GrammarRefused(f"it can't be held: {strict} {bound} is too close to another bound")
        if schema[strict] is True:
            del schema[strict], schema[plain]
        else:
            del schema[strict]
        kept = schema.get(plain)
        schema[plain] = moved if not is_number(kept) else (max if inside == 1 else min)(kept, moved)


def is_number(value: object) -> TypeGuard[float]:
    """Say whether a value of JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)
