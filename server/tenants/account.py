"""What one key has used: requests and tokens of the last minute, requests under way, and its budget.

A request takes a ticket at the door and gives it back when it is over, however it ends. Tokens are reserved before
anything is computed, as many as there could be, and what was not used is given back. The budget is spent out of a loan
that is on the disk before it is used: what a crash forgets was counted as spent, not as free. One thread only.
"""

import math
from dataclasses import dataclass

from manylora.adapters.keys import KeyTerms
from manylora.server.errors import QuotaExhausted, RateLimited
from manylora.server.tenants.window import SlidingWindow, Slot

LOANS = 100
"""A budget is lent out in so many parts at least: that share of it is what a crash may cost the tenant."""
MOST_LOAN, LEAST_LOAN = 100_000, 64
"""Tokens of a loan."""
SOON = 1.0
"""Seconds after which who found too much under way may try again."""


@dataclass(frozen=True, slots=True)
class Standing:
    """One limit as a client is told of it."""

    limit: int
    remaining: int
    reset: float
    """Seconds until all of it is there again."""


class Account:
    """What a key has used, and may use. Times are seconds of a clock that only goes forward."""

    def __init__(self, terms: KeyTerms, spent: int) -> None:
        """``spent`` is what the disk says: nothing of that is used again."""
        self.terms = terms
        self.used = spent
        """Tokens of the budget that are gone."""
        self.lent = spent
        """Tokens of the budget that the disk knows as gone."""
        self.reserved = 0
        self.inside = 0
        self._requests = _window(terms.requests_per_minute)
        self._tokens = _window(terms.tokens_per_minute)

    def change(self, terms: KeyTerms) -> None:
        """Go on under other terms; what was used stays used. A budget where none was counts from now on."""
        self._requests = _changed(self._requests, terms.requests_per_minute)
        self._tokens = _changed(self._tokens, terms.tokens_per_minute)
        if self.terms.budget is None and terms.budget is not None:
            self.used = min(self.used, self.lent)
        self.terms = terms

    def enter(self, now: float, *, asks: bool = True) -> "Ticket":
        """Let a request in. Raises RateLimited and QuotaExhausted, and has then counted nothing.

        A request that doesn't ``asks`` models is let in whatever is left of the budget.
        """
        terms = self.terms
        if asks and terms.budget is not None and self.used >= terms.budget:
            raise self._exhausted()
        if terms.parallel is not None and self.inside >= terms.parallel:
            raise RateLimited(
                f"{self.inside} requests with this key are under way, at most {terms.parallel} may be: wait for one to"
                " end",
                kind="requests",
                retry_after=SOON,
            )
        if self._requests is not None:
            wait = self._requests.wait(1, now)
            if wait > 0:
                raise RateLimited(
                    f"this key may send {self._requests.limit} requests per minute, and has: try again in"
                    f" {math.ceil(wait)} s",
                    kind="requests",
                    retry_after=wait,
                )
            self._requests.take(1, now)
        self.inside += 1
        return Ticket(self)

    def most_tokens(self) -> int | None:
        """Return how many tokens any request could take; None: no limit says."""
        limits = [] if self._tokens is None else [self._tokens.limit]
        if self.terms.budget is not None:
            limits.append(max(0, self.terms.budget - self.used))
        return min(limits, default=None)

    def loan_for(self, tokens: int) -> int | None:
        """Return up to where the budget must be on the disk as lent before so many more are reserved; None: it is.

        Never beyond the budget: ``reserve`` refuses what that doesn't hold.
        """
        budget = self.terms.budget
        needed = self.used + self.reserved + tokens
        if budget is None or needed <= self.lent or needed > budget:
            return None
        loan = max(LEAST_LOAN, min(MOST_LOAN, budget // LOANS))
        return min(budget, needed + loan)

    def check_tokens(self, tokens: int, now: float) -> None:
        """Raise RateLimited or QuotaExhausted if so many tokens can't be reserved now."""
        budget = self.terms.budget
        if budget is not None and self.used + tokens > budget:
            raise self._exhausted(tokens)
        if budget is not None and self.used + self.reserved + tokens > budget:
            raise RateLimited(
                f"this request may take {tokens} tokens, and requests under way hold {self.reserved} of the"
                f" {budget - self.used} that are left of this key's budget: wait for one to end",
                kind="tokens",
                retry_after=SOON,
            )
        if self._tokens is None:
            return
        wait = self._tokens.wait(tokens, now)
        if math.isinf(wait):
            raise RateLimited(
                f"this request may take {tokens} tokens (prompt and max_tokens), over the {self._tokens.limit} per"
                " minute of this key: ask for fewer",
                kind="tokens",
                should_retry=False,
            )
        if wait > 0:
            raise RateLimited(
                f"this request may take {tokens} tokens (prompt and max_tokens), and of this key's {self._tokens.limit}"
                f" per minute {self._tokens.remaining(now)} are left: try again in {math.ceil(wait)} s",
                kind="tokens",
                retry_after=wait,
            )

    def take(self, tokens: int, now: float) -> Slot | None:
        """Reserve tokens that ``check_tokens`` let through."""
        self.reserved += tokens
        return None if self._tokens is None else self._tokens.take(tokens, now)

    def settle(self, slot: Slot | None, reserved: int, used: int) -> None:
        """Have ``used`` tokens be gone instead of those reserved."""
        self.reserved -= reserved
        self.used += used
        if slot is not None and self._tokens is not None:
            self._tokens.settle(slot, reserved, used)

    def standings(self, now: float) -> dict[str, Standing]:
        """Return the limits that the key has, by what they limit: ``requests``, ``tokens``."""
        windows = {"requests": self._requests, "tokens": self._tokens}
        return {
            kind: Standing(window.limit, window.remaining(now), window.reset(now))
            for kind, window in windows.items()
            if window is not None
        }

    def _exhausted(self, tokens: int | None = None) -> QuotaExhausted:
        budget = self.terms.budget or 0
        left = max(0, budget - self.used)
        if tokens is None:
            return QuotaExhausted(f"this key's budget of {budget} tokens is used up")
        return QuotaExhausted(
            f"this request may take {tokens} tokens (prompt and max_tokens), of this key's budget of {budget} are"
            f" {left} left"
        )


class Reservation:
    """Tokens that one part of a request may use."""

    def __init__(self, account: Account, slot: Slot | None, tokens: int) -> None:
        self._account = account
        self._slot = slot
        self._tokens = tokens
        self._open = True

    def settle(self, used: int | None) -> None:
        """Say what was used in the end: the rest is free again. None: all of it. Once; later calls change nothing."""
        if self._open:
            self._open = False
            self._account.settle(self._slot, self._tokens, self._tokens if used is None else used)


class Ticket:
    """One request's place in its key's account. ``close`` it when the request is over, however it ended."""

    def __init__(self, account: Account) -> None:
        self.account = account
        self._reservations: list[Reservation] = []
        self._open = True

    def reserve(self, tokens: int, now: float) -> Reservation:
        """Reserve tokens. Raises RateLimited or QuotaExhausted. Ask ``Account.loan_for`` first."""
        self.account.check_tokens(tokens, now)
        reservation = Reservation(self.account, self.account.take(tokens, now), tokens)
        self._reservations.append(reservation)
        return reservation

    def close(self) -> None:
        """Leave. What nobody settled counts as it was reserved. Harmless when it was done."""
        if self._open:
            self._open = False
            self.account.inside -= 1
            for reservation in self._reservations:
                reservation.settle(None)


def _changed(window: SlidingWindow | None, limit: int | None) -> SlidingWindow | None:
    if window is None or limit is None:
        return _window(limit)
    window.limit = limit
    return window


def _window(limit: int | None) -> SlidingWindow | None:
    return None if limit is None else SlidingWindow(limit)
