"""All kinds of hostile requests, how often each comes, and the seeded plan of a run."""

from collections.abc import Iterator, Mapping
from random import Random

from manylora.loadtest.checks.bars.hostile import adapters, generation, transport
from manylora.loadtest.checks.bars.hostile.kind import Kind, Plan, Scene

WEIGHTS: Mapping[Kind, int] = {
    generation.sampling_edges: 240,
    generation.spelled_tokens: 120,
    generation.ids_beyond: 80,
    generation.contexts: 60,
    generation.hang_ups: 80,
    generation.many_choices: 6,
    generation.scored_prompts: 4,
    generation.tokenize_much: 10,
    generation.tokenize_spaces: 1,
    generation.wrong_json: 40,
    generation.unknown_names: 30,
    generation.wrong_messages: 40,
    adapters.huge_adapters: 40,
    adapters.pattern_bombs: 30,
    adapters.template_bombs: 20,
    adapters.odd_configs: 20,
    adapters.odd_weights: 15,
    adapters.sources: 20,
    adapters.odd_names: 30,
    adapters.contested: 15,
    adapters.routers_loads: 20,
    adapters.deleted_while_running: 15,
    transport.half_sent: 30,
    transport.dripped: 15,
    transport.silent: 3,
    transport.giant_heads: 6,
    transport.wrong_requests: 30,
    transport.pipelined: 10,
    transport.odd_routes: 60,
    transport.odd_headers: 30,
}
"""Shares of all requests. The dearest come seldom: what each does to the others shows in one."""


def label(kind: Kind) -> str:
    """Return a kind's name in tables."""
    return kind.__name__.replace("_", " ")


def plans(
    seed: int, count: int, models: tuple[str, ...], sources: tuple[str, ...], only: tuple[str, ...] = ()
) -> Iterator[tuple[str, Plan]]:
    """Yield ``count`` hostile clients, the same for the same seed. Every kind comes once before any comes by chance."""
    rng = Random(seed)
    kinds = [kind for kind in WEIGHTS if not only or label(kind) in only]
    drawn = rng.sample(kinds, min(count, len(kinds)))
    drawn += rng.choices(kinds, [WEIGHTS[kind] for kind in kinds], k=count - len(drawn))
    for number, kind in enumerate(drawn):
        yield label(kind), kind(Random(rng.getrandbits(64)), Scene(number, models, sources))
