"""When requests keep failing the base is asked; only if that fails too is the server not ready, until it goes well."""

import pytest

from manylora.server.engine.health import FAULTS_IN_A_ROW, PROBE_AGAIN
from manylora.server.engine.request import FinishReason
from tests.server.engine.fakes import Harness, Pools, ask, expected

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]


def fail(harness: Harness, name: str, adapters: tuple[tuple[int, float], ...] = ()) -> None:
    harness.engine.add_request(ask(name, PROMPT, 4, adapters))
    harness.run()
    assert harness.reason(name) is FinishReason.FAILED


def trouble(harness: Harness) -> str:
    return harness.engine.health.trouble or ""


def test_a_base_that_fails_every_request_makes_it_unready_until_one_goes_well() -> None:
    harness = Harness()
    harness.model.overflows = lambda token, mark: True
    for number in range(FAULTS_IN_A_ROW):
        assert trouble(harness) == ""
        fail(harness, f"r{number}")
    harness.step()
    assert "4 requests failed" in trouble(harness)
    harness.model.overflows = lambda token, mark: False
    harness.engine.add_request(ask("good", PROMPT, 4))
    harness.run()
    assert trouble(harness) == ""
    assert harness.engine.health.next_probe() is None


def test_it_becomes_ready_by_itself_when_nobody_asks() -> None:
    """Where traffic has been taken away no request can show that all is well again."""
    harness = Harness()
    health = harness.engine.health
    harness.model.overflows = lambda token, mark: True
    for number in range(FAULTS_IN_A_ROW):
        fail(harness, f"r{number}")
    harness.step()
    due = health.next_probe()
    assert due is not None
    assert health.take_probe(due - 0.01) is None
    harness.model.overflows = lambda token, mark: False
    probe = health.take_probe(due + PROBE_AGAIN)
    assert probe is not None
    assert health.next_probe() is None, "one at a time"
    harness.engine.add_request(probe)
    harness.run()
    assert trouble(harness) == ""


@pytest.mark.parametrize("bad", [1, 3])
def test_adapters_that_overflow_do_not_make_it_unready(bad: int) -> None:
    harness = Harness()
    for adapter_id in range(1, bad + 1):
        harness.know(adapter_id)
    harness.model.overflows = lambda token, mark: mark > 0
    for number in range(20):
        fail(harness, f"r{number}", ((1 + number % bad, 1.0),))
        assert trouble(harness) == ""
    assert len(harness.observer.ended) == 20, "probes are nobody's requests"


def test_a_prompt_that_fails_on_the_base_does_not_make_it_unready() -> None:
    harness = Harness()
    harness.model.overflows = lambda token, mark: token == PROMPT[-1]
    for number in range(20):
        fail(harness, f"r{number}")
        assert trouble(harness) == ""


def test_steps_that_fail_make_it_unready_at_once_until_the_base_answers() -> None:
    harness = Harness()
    harness.model.fault = lambda tokens: RuntimeError("boom") if tokens == PROMPT else None
    for number in range(FAULTS_IN_A_ROW):
        assert trouble(harness) == ""
        harness.engine.add_request(ask(f"r{number}", PROMPT))
        harness.step()
    assert "steps failed" in trouble(harness)
    harness.step()
    assert trouble(harness) == ""


def test_what_fails_for_other_reasons_is_no_fault() -> None:
    harness = Harness(Pools(rows=4, adapter_timeout=0.0))
    harness.know(1, pinned=True)
    harness.know(2)
    harness.engine.add_request(ask("busy", PROMPT, 60, ((1, 1.0),)))
    harness.step()
    for number in range(5):
        harness.engine.add_request(ask(f"waits{number}", PROMPT, 3, ((2, 1.0),)))
        harness.engine.add_request(ask(f"unknown{number}", PROMPT, 3, ((9, 1.0),)))
        harness.engine.add_request(ask(f"aborted{number}", PROMPT, 3))
        harness.step()
        harness.engine.abort(f"aborted{number}")
    assert harness.engine.health.failed_requests == 0
    harness.run()
    assert harness.tokens("busy") == expected(PROMPT, 60, ((1, 1.0),))


def test_a_probe_that_can_not_be_made_counts_as_failed() -> None:
    harness = Harness()
    harness.letters.broken = set(range(64))
    for number in range(FAULTS_IN_A_ROW):
        fail(harness, f"r{number}")
    harness.step()
    assert trouble(harness)
    assert harness.engine.health.next_probe() is not None
