"""Registrations as jobs: what is kept of one that failed, and of how many."""

import contextlib
import gc
import weakref

import pytest

from manylora.adapters.errors import AdapterError, InvalidAdapter
from manylora.server.catalog.operations import Caller, CallerLeft
from manylora.server.catalog.progress import Phase, Progress
from manylora.server.catalog.registrations import (
    KEPT_SECONDS,
    MOST_FAILED,
    MOST_OF_A_TENANT,
    MOST_UNDER_WAY,
    Registration,
    Registrations,
)
from manylora.server.errors import QueueFull, RegistrationCancelled


class Weights:
    """What takes much memory."""


def test_a_failure_is_told_of_and_keeps_nothing_that_its_work_held() -> None:
    registrations = Registrations()
    held: list[weakref.ref[Weights]] = []

    def work() -> None:
        weights = Weights()
        held.append(weakref.ref(weights))
        try:
            raise ValueError(weights)
        except ValueError as error:
            raise InvalidAdapter("too short", file="adapter_model.safetensors") from error

    registration = registrations.open("a", "there", asked="x")
    with contextlib.suppress(AdapterError), registrations.running(registration):
        work()
    gc.collect()
    assert held[0]() is None
    told = registrations.of("a")
    assert told is registration
    assert (type(told.error), str(told.error)) == (InvalidAdapter, "adapter_model.safetensors: too short")


def fail(registrations: Registrations, registration: Registration) -> None:
    with contextlib.suppress(AdapterError), registrations.running(registration):
        raise InvalidAdapter("no")


def test_so_many_are_under_way_that_nobody_waits_for() -> None:
    registrations = Registrations()
    for number in range(100):
        registrations.open(f"waited{number}", "there", tenant="acme")
    mine = [registrations.open("acme/x", "there", asked="x", tenant="acme") for _ in range(MOST_OF_A_TENANT)]
    with pytest.raises(QueueFull):
        registrations.open("acme/y", "there", asked="x", tenant="acme")
    for number in range(MOST_UNDER_WAY - MOST_OF_A_TENANT):
        registrations.open(f"own{number}", "there", asked="x")
    for tenant in ("", "globex"):
        with pytest.raises(QueueFull) as refused:
            registrations.open("y", "there", asked="x", tenant=tenant)
        assert refused.value.retry_after
    fail(registrations, mine[0])
    registrations.open("globex/y", "there", asked="x", tenant="globex")


def test_one_tenants_failures_push_out_its_own() -> None:
    registrations = Registrations()
    for tenant, count in (("acme", 3), ("globex", MOST_FAILED + 5)):
        for number in range(count):
            fail(registrations, registrations.open(f"{tenant}/{number}", "there", asked="x", tenant=tenant))
    told = [each.name for each in registrations.all()]
    assert len(told) == MOST_FAILED
    assert [name for name in told if name.startswith("acme/")] == ["acme/0", "acme/1", "acme/2"]
    assert f"globex/{MOST_FAILED + 4}" in told
    assert "globex/0" not in told


def test_a_failure_is_forgotten_when_what_was_asked_for_later_is_served() -> None:
    registrations = Registrations()
    first, second = (registrations.open("a", "there", asked=asked) for asked in "xy")
    fail(registrations, first)
    third = registrations.open("a", "there")
    assert registrations.all() == [third]
    with registrations.running(third):
        pass
    with registrations.running(second):
        assert registrations.of("a") is second
        assert second.state == "waiting"
    assert (second.state, second.over.is_set()) == ("ready", True)
    assert registrations.of("a") is None


def test_a_failure_is_told_of_for_a_while() -> None:
    registrations = Registrations()
    failed = registrations.open("a", "there", asked="x")
    fail(registrations, failed)
    assert failed.ended is not None
    failed.ended -= KEPT_SECONDS - 60
    assert registrations.of("a") is failed
    failed.ended -= 120
    assert registrations.of("a") is None
    assert (failed.state, failed.over.is_set()) == ("failed", True)
    fail(registrations, registrations.open("b", "there"))
    assert registrations.all() == [], "whoever waited for it has heard"
    fail(registrations, registrations.open("b", "there", asked="x"))
    fail(registrations, registrations.open("b", "there"))
    assert registrations.of("b") is None, "it was asked for again since"


def test_one_that_is_cancelled_is_joined_by_nobody_and_told_of_to_whoever_waits() -> None:
    registrations = Registrations()
    one = registrations.open("a", "there", asked="x")
    assert registrations.same("a", "x") is one
    assert registrations.same("a", "y") is None
    assert registrations.same("b", "x") is None
    assert registrations.cancel("a") == [one]
    assert (one.state, one.caller.left) == ("cancelled", True)
    assert registrations.same("a", "x") is None
    with pytest.raises(RegistrationCancelled, match="'a' was cancelled"), registrations.running(one):
        raise CallerLeft
    assert one.state == "cancelled"
    assert registrations.of("a") is None
    with pytest.raises(CallerLeft), registrations.running(registrations.open("a", "there")):
        raise CallerLeft


def test_a_server_that_closes_waits_for_no_host() -> None:
    registrations = Registrations()

    def under_way(name: str, phase: Phase, *, is_remote: bool) -> Caller:
        caller = registrations.open(name, "there").caller
        caller.progress = Progress(phase, is_remote=is_remote)
        return caller

    ended = [under_way("a", phase, is_remote=True) for phase in ("waiting", "downloading")]
    kept = [under_way("a", "checking", is_remote=True), under_way("b", "waiting", is_remote=False)]
    registrations.end_downloads()
    assert [caller.left for caller in (*ended, *kept)] == [True, True, False, False]
