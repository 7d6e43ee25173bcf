"""The model "auto": which adapter a request's prompt is for, found at the door by one reading of it by the base.

From there on it is that adapter's request as if it had been asked by its name: its template, its tokens, its answer.
"""

from collections.abc import Sequence
from dataclasses import replace

from manylora.adapters.names import AUTO
from manylora.server.api.asks import Ask, ChatPrompt
from manylora.server.api.base_reading import BaseReading, read_chat, read_plain
from manylora.server.api.calling import behind, current_caller, current_ticket, seen_catalog
from manylora.server.api.dependencies import ApiDependencies
from manylora.server.api.example_reading import pool
from manylora.server.api.request_context import note
from manylora.server.catalog import Described, Routed
from manylora.server.engine.request import Vector
from manylora.server.errors import InvalidRequest

HOW = "give adapters example prompts (manylora_adapter.json, or examples when they are registered), or name a model"


def candidates_of(deps: ApiDependencies) -> tuple[Described, ...]:
    """Return the adapters that a request of this caller may be given to; () where none has examples."""
    return () if deps.routing is None else deps.routing.candidates(seen_catalog(deps).described())


async def choose(deps: ApiDependencies, ask: Ask) -> Ask:
    """Return a request for "auto" as one for the model that its prompt is for, with how that was chosen.

    Raises InvalidRequest for what can't be chosen by, AdapterUnavailable while nothing can be, and what a prompt that
    is pooled is refused for.
    """
    candidates = candidates_of(deps)
    _check(ask, candidates)
    assert deps.routing is not None, "without it nobody is a candidate"
    contest = await deps.routing.ready(candidates)
    reading = await _read(deps, ask)
    vector = reading.vector(await _states(deps, reading, ask.priority))
    found = replace(await deps.routing.choose(contest, reading.form, vector), prompt_tokens=len(reading.ids))
    base = deps.settings.base_model
    if found.name == base and not current_caller().may_use(base):
        raise InvalidRequest(
            f"no adapter is near enough to this prompt ({found.nearest!r} is nearest, {found.score:.2f} of the"
            f" {found.threshold:.2f} that it takes), and this key may not use the base: name a model",
            param="model",
        )
    note(auto=found.name, auto_score=round(found.score, 4))
    deps.metrics.by_adapter.count_routed(found.name, found.score)
    return replace(ask, model=found.name, routed=found)


def is_still_there(deps: ApiDependencies, routed: Routed | None) -> bool:
    """Say whether what was chosen can still be asked for: if it went meanwhile, another is chosen."""
    names = {deps.settings.base_model, *(each.name for each in candidates_of(deps))}
    return routed is None or routed.name in names


def _check(ask: Ask, candidates: Sequence[Described]) -> None:
    if ask.beside.parts:
        raise InvalidRequest(
            f"model is {AUTO!r}, which chooses one adapter: beside {ask.beside.model_param} it names the base",
            param=ask.beside.model_param,
        )
    if not candidates:
        raise InvalidRequest(f"model {AUTO!r} has nothing to choose from: {HOW}", param="model")
    if isinstance(ask.prompt, ChatPrompt):
        return
    [prompt, *others] = ask.prompt.prompts
    if others:
        raise InvalidRequest(
            f"{ask.prompt.param}: {ask.num_prompts} prompts may be for different adapters: with model {AUTO!r} send a"
            " request for each",
            param=ask.prompt.param,
        )
    if not isinstance(prompt, str):
        raise InvalidRequest(
            f"{ask.prompt.param}: token ids are one tokenizer's, and an adapter may have its own: with model {AUTO!r}"
            " send a text",
            param=ask.prompt.param,
        )


async def _read(deps: ApiDependencies, ask: Ask) -> BaseReading:
    prompt = ask.prompt
    if isinstance(prompt, ChatPrompt):
        return await read_chat(deps, prompt)
    text, special = str(prompt.prompts[0]), prompt.add_special_tokens and not prompt.suffix
    return await read_plain(deps, text, prompt.param, add_special_tokens=special)


async def _states(deps: ApiDependencies, reading: BaseReading, priority: int) -> Vector:
    """Return the mean of the prompt's states that count. Its tokens are the key's: they are computed for it."""
    caller, ticket = current_caller(), current_ticket()
    reservation = None if ticket is None else await deps.keys.reserve(ticket, len(reading.ids))
    used = 0
    try:
        scope = "" if deps.settings.share_prefixes else caller.tenant
        [vector] = await pool(
            deps,
            [reading],
            priority=priority + behind(),
            scope=scope,
            tenant=caller.tenant,
            weight=caller.weight,
        )
        used = len(reading.ids)
    finally:
        if reservation is not None:
            reservation.settle(used)
    return vector
