"""Registrations as jobs: what is kept of one that failed, and of how many."""

import contextlib
import gc
import weakref

from manylora.adapters.errors import AdapterError, InvalidAdapter
from manylora.server.catalog.registrations import Registrations


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

    registration = registrations.open("a", "there", is_told=True)
    with contextlib.suppress(AdapterError), registrations.running(registration):
        work()
    gc.collect()
    assert held[0]() is None
    told = registrations.of("a")
    assert told is registration
    assert (type(told.error), str(told.error)) == (InvalidAdapter, "adapter_model.safetensors: too short")
