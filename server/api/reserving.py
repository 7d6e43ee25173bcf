"""Tokens of a key's limits, reserved before anything is computed: prompts, and all that may be generated."""

from collections.abc import Sequence
from dataclasses import replace

from manylora.server.api.asks import Ask
from manylora.server.api.calling import current_ticket
from manylora.server.api.dependencies import ApiDependencies
from manylora.server.engine.request import UNBOUNDED, SamplingParams
from manylora.server.tenants.account import Reservation


async def reserve(
    deps: ApiDependencies, ask: Ask, prompts: Sequence[Sequence[int]], sampling: SamplingParams
) -> tuple[SamplingParams, Reservation | None]:
    """Reserve a request's tokens; return how to sample within them. None: nothing is limited.

    Who names no max_tokens gets as many as the context holds and the key's limits ever let one request have; so what
    he gets doesn't depend on what else is under way. Raises RateLimited and QuotaExhausted.
    """
    ticket = current_ticket()
    if ticket is None:
        return sampling, None
    asked, answers = sum(map(len, prompts)), ask.n * len(prompts)
    if ask.pooling is not None:
        return sampling, await deps.keys.reserve(ticket, asked)
    if sampling.max_tokens == UNBOUNDED:
        most = deps.settings.context_length - max(map(len, prompts), default=0)
        allowed = ticket.account.most_tokens()
        if allowed is not None:
            most = min(most, (allowed - asked) // max(1, answers))
        sampling = replace(sampling, max_tokens=max(1, most))
    reservation = await deps.keys.reserve(ticket, asked + answers * sampling.max_tokens)
    return sampling, reservation
