"""Whose turn it is among those that run: which sequences have a part in a step, and in what order. Changes nothing.

Decodes come first; of each client's request one is in every step, and further ones share what a step may attend to.
"""

from collections import Counter
from collections.abc import Iterable
from operator import attrgetter

from manylora.server.engine.sequence import Sequence

_FORCED = 64
"""Tokens that a stream was given without computing them, at most, for it to go before the prompts."""
_ALONE = 4
"""How many times as far a step's context goes for a request that runs alone: a newcomer waits for one such step."""
_AGE = attrgetter("number")


def in_turn(running: Iterable[Sequence], most_context: int) -> tuple[list[Sequence], list[Sequence]]:
    """Return the sequences that have a part in this step, decodes and prompts, older ones first.

    Streams whose grammar gave them tokens share with the prompts what a step has beside its decodes, as these are
    computed like theirs; but they go first, in turn: else they would stand still while an older prompt comes in.
    """
    decodes: list[Sequence] = []
    prompts: list[Sequence] = []
    origins: set[str] = set()
    for sequence in running:
        left = len(sequence.token_ids) - sequence.num_computed_tokens
        (decodes if left == 1 else prompts).append(sequence)
        origins.add(sequence.owner.origin)
    if len(origins) < len(decodes) + len(prompts):
        decodes = _share(decodes, most_context * (1 if len(origins) > 1 else _ALONE))
    decodes.sort(key=_AGE)
    prompts.sort(key=_turn)
    return decodes, prompts


def _share(decodes: list[Sequence], most: int) -> list[Sequence]:
    """Return one decode of each client's request, and further ones until ``most`` tokens are attended to.

    Those that longest had no part come first; of each request as many as of any other, if it has so many.
    """
    taken: Counter[str] = Counter()
    rounds: dict[int, list[Sequence]] = {}
    for sequence in sorted(decodes, key=lambda s: (s.last_step, s.number)):
        rounds.setdefault(taken[sequence.owner.origin], []).append(sequence)
        taken[sequence.owner.origin] += 1
    chosen = rounds.pop(0, [])
    context = sum(len(s.token_ids) for s in chosen)
    for number in sorted(rounds):
        for sequence in rounds[number]:
            context += len(sequence.token_ids)
            if context > most:
                return chosen
            chosen.append(sequence)
    return chosen


def _turn(sequence: Sequence) -> tuple[bool, int, int]:
    """Return what sequences with more than a token to compute are in order of: streams before prompts."""
    streams = sequence.num_output_tokens > 0 and sequence.num_to_compute <= _FORCED
    return not streams, sequence.last_step if streams else 0, sequence.number
