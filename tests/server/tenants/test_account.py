"""What a key has used: windows that nothing slips through, and accounts that balance however requests end."""

import math
from collections import deque
from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.adapters.keys import KeyTerms
from manylora.server.errors import QuotaExhausted, RateLimited
from manylora.server.tenants.account import LEAST_LOAN, Account, Ticket
from manylora.server.tenants.window import SECONDS, SlidingWindow


@given(
    limit=st.integers(1, 50),
    asks=st.lists(st.tuples(st.floats(0, 7), st.integers(1, 20), st.floats(0, 1)), max_size=120),
)
def test_in_no_minute_is_more_taken_than_the_limit(limit: int, asks: list[tuple[float, int, float]]) -> None:
    window, now = SlidingWindow(limit), 0.0
    taken: deque[tuple[float, int]] = deque()
    for pause, amount, share in asks:
        now += pause
        wait = window.wait(amount, now)
        if wait > 0:
            assert amount > limit or deepcopy(window).wait(amount, now + wait + 1e-6) == 0, "it says when"
            assert math.isinf(wait) == (amount > limit)
            continue
        slot = window.take(amount, now)
        used = math.ceil(amount * share)
        window.settle(slot, amount, used)
        taken.append((now, used))
        assert sum(each for at, each in taken if at > now - SECONDS) <= limit
        assert window.remaining(now) <= limit - sum(each for at, each in taken if at > now - SECONDS)
    assert window.remaining(now + window.reset(now) + 1e-6) == limit


def test_a_second_counts_until_all_of_it_is_a_minute_ago() -> None:
    window = SlidingWindow(1)
    window.take(1, 0.9)
    assert window.wait(1, 60.5) == pytest.approx(0.5), "59.6 s later"
    assert window.wait(1, 61.0) == 0


@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.one_of(st.none(), st.integers(0, 60)), st.booleans()), max_size=60
    )
)
def test_a_budget_is_never_exceeded_and_the_disk_knows_first(
    asks: list[tuple[int, int | None, bool]],
) -> None:
    """Whatever is used and whenever the process dies, the disk has counted it as gone."""
    budget = 500
    account = Account(KeyTerms("t", budget=budget), 0)
    disk, used, under_way = 0, 0, list[Ticket]()
    for tokens, spent, at_once in asks:
        try:
            ticket = account.enter(0.0)
        except QuotaExhausted:
            assert used == budget
            continue
        under_way.append(ticket)
        try:
            account.check_tokens(tokens, 0.0)
            while (loan := account.loan_for(tokens)) is not None:
                disk = account.lent = loan
            reservation = ticket.reserve(tokens, 0.0)
        except (QuotaExhausted, RateLimited):
            continue
        assert used + account.reserved <= disk <= budget
        if at_once:
            gone = tokens if spent is None else min(spent, tokens)
            reservation.settle(gone)
            reservation.settle(tokens)
            used += gone
            assert account.used == used <= disk
    reserved = account.reserved
    for ticket in under_way:
        ticket.close()
        ticket.close()
    assert (account.inside, account.reserved, account.used) == (0, 0, used + reserved)


def test_a_crash_costs_no_more_than_a_loan() -> None:
    account = Account(KeyTerms("t", budget=100_000), 0)
    lent = account.loan_for(10)
    assert lent is not None
    assert 10 <= lent <= 10 + max(LEAST_LOAN, 100_000 // 100)


def test_requests_are_counted_only_when_they_are_let_in() -> None:
    account = Account(KeyTerms("t", requests_per_minute=2, parallel=1), 0)
    first = account.enter(0.0)
    for _ in range(5):
        with pytest.raises(RateLimited, match="under way"):
            account.enter(0.5)
    first.close()
    account.enter(1.0).close()
    for _ in range(5):
        with pytest.raises(RateLimited) as refused:
            account.enter(2.0)
        assert refused.value.retry_after == pytest.approx(59.0)
    account.enter(61.0).close()


def test_what_can_never_be_had_is_not_to_be_asked_for_again() -> None:
    account = Account(KeyTerms("t", tokens_per_minute=100, budget=50), 0)
    with pytest.raises(QuotaExhausted):
        account.check_tokens(51, 0.0)
    account = Account(KeyTerms("t", tokens_per_minute=100), 0)
    with pytest.raises(RateLimited) as refused:
        account.check_tokens(101, 0.0)
    assert (refused.value.should_retry, refused.value.retry_after) == (False, None)


def test_what_others_hold_for_a_moment_may_be_had_later() -> None:
    account = Account(KeyTerms("t", budget=100), 0)
    ticket = account.enter(0.0)
    ticket.reserve(80, 0.0)
    with pytest.raises(RateLimited) as refused:
        account.check_tokens(40, 0.0)
    assert refused.value.retry_after == 1.0
    ticket.close()
    with pytest.raises(QuotaExhausted):
        account.check_tokens(40, 0.0)


def test_other_limits_forget_nothing() -> None:
    account = Account(KeyTerms("acme", requests_per_minute=4, tokens_per_minute=100, budget=100), 0)
    for _ in range(4):
        ticket = account.enter(10.0)
    running = ticket.reserve(40, 10.0)
    account.change(KeyTerms("acme", requests_per_minute=5, tokens_per_minute=60, budget=70))
    account.enter(10.0)
    with pytest.raises(RateLimited, match="5 requests per minute"):
        account.enter(10.0)
    account.check_tokens(20, 10.0)
    with pytest.raises(RateLimited, match="are left: try again"):
        account.check_tokens(21, 10.0)
    running.settle(30)
    account.check_tokens(30, 10.0)
    account.change(KeyTerms("acme", requests_per_minute=2, tokens_per_minute=1000, budget=20))
    with pytest.raises(QuotaExhausted):
        account.enter(10.0)
    account.change(KeyTerms("acme"))
    account.enter(10.0)
    assert not account.standings(10.0)


def test_under_a_lower_limit_one_waits_until_enough_is_free() -> None:
    window = SlidingWindow(10)
    for second in range(10):
        window.take(1, float(second))
    window.limit = 3
    assert window.remaining(9.0) == 0
    wait = window.wait(1, 9.0)
    assert deepcopy(window).wait(1, 9.0 + wait + 1e-6) == 0, "it says when"
    assert window.wait(1, 9.0 + wait - 1e-6) > 0


def test_a_budget_counts_from_when_it_is_set() -> None:
    account = Account(KeyTerms("acme"), 0)
    account.enter(0.0).reserve(5000, 0.0).settle(None)
    account.change(KeyTerms("acme", budget=100))
    ticket = account.enter(0.0)
    assert account.loan_for(60) is not None
    ticket.reserve(60, 0.0)
    with pytest.raises(RateLimited):
        ticket.reserve(60, 0.0)
