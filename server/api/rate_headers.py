"""What a key has left, as OpenAI's clients read it: x-ratelimit-{limit,remaining,reset}-{requests,tokens}."""

import math
from collections.abc import Mapping

from manylora.server.tenants.account import Account

KINDS = ("requests", "tokens")
NAMES = tuple(f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in KINDS)


def headers_of(account: Account, now: float) -> Mapping[str, str]:
    """Return the headers of those limits that the key has, as they stand at ``now``."""
    found: dict[str, str] = {}
    for kind, standing in account.standings(now).items():
        found[f"x-ratelimit-limit-{kind}"] = str(standing.limit)
        found[f"x-ratelimit-remaining-{kind}"] = str(standing.remaining)
        found[f"x-ratelimit-reset-{kind}"] = duration(standing.reset)
    return found


def duration(seconds: float) -> str:
    """Return a time as OpenAI writes it: 0s, 12ms, 1.5s, 6m0s. Never less than it is."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes}m{rest / 1000:g}s" if minutes else f"{rest / 1000:g}s"
