"""A histogram that takes many values at once says what prometheus-client's says that takes them one by one."""

import random

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from manylora.server.api.tally import PENDING, Tally

BOUNDS = (0.001, 0.01, 0.5, 1.0, 2.5)


def lines(registry: CollectorRegistry) -> list[str]:
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


def test_it_says_what_a_histogram_says() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    tally = Tally("x_seconds", "Seconds", BOUNDS, ours)
    histogram = Histogram("x_seconds", "Seconds", buckets=BOUNDS, registry=theirs)
    assert lines(ours) == lines(theirs)
    rng = random.Random(0)
    for count in (1, 3, PENDING + 7, 0, 32):
        # Sums of these are exact, in whatever order.
        values = [rng.choice([*BOUNDS[2:], 0.25, 8.0, 2.0**-12]) for _ in range(count)]
        tally.observe_all(values)
        assert len(tally._pending) < PENDING  # nowhere else is it seen that it doesn't grow
        for value in values:
            histogram.observe(value)
        assert lines(ours) == lines(theirs)
