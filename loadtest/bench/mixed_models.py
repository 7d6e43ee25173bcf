"""Mixtures to ask a server for: as many as there are streams, each another one of two adapters. Names only."""

from collections.abc import Sequence


def mixed_models(names: Sequence[str], count: int) -> list[str]:
    """Return ``count`` different models like "a:0.72+b:0.28", each of two of the ``names``.

    No two share an adapter where there are enough of them; their weights are different in any case. Raises ValueError
    for fewer than two names.
    """
    if len(names) < 2:
        raise ValueError(
            f"a mixture needs two adapters, the server has {len(names)}: name more with --adapters"
        )
    apart = len(names) >= 2 * count
    found = []
    for number in range(count):
        first = 2 * number if apart else number % len(names)
        step = 1 if apart else 1 + number // len(names) % (len(names) - 1)
        weight = round(0.5 + 0.4 * (number + 1) / (count + 1), 4)
        other = names[(first + step) % len(names)]
        found.append(f"{names[first]}:{weight:g}+{other}:{round(1 - weight, 4):g}")
    return found
