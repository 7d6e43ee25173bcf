"""Memory is given back to the system in pauses."""

import asyncio
from types import SimpleNamespace

import pytest

from manylora.server.api import app
from manylora.server.engine.pace import Tempo

PAUSE = 0.01


def test_memory_is_given_back_once_in_each_pause_and_never_beside_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[int] = []
    deps = SimpleNamespace(
        metrics=SimpleNamespace(http=SimpleNamespace(served=0)), engine=SimpleNamespace(tempo=None)
    )
    monkeypatch.setattr(app, "give_back", lambda: given.append(deps.metrics.http.served))

    async def story() -> None:
        task = asyncio.create_task(app.give_back_in_pauses(deps, PAUSE))  # type: ignore[arg-type]  # what it reads
        await asyncio.sleep(5 * PAUSE)
        assert given == []  # nothing has been asked yet
        deps.metrics.http.served, deps.engine.tempo = 7, Tempo(1, 0.01)
        await asyncio.sleep(5 * PAUSE)
        assert given == []
        deps.engine.tempo = None
        await asyncio.sleep(20 * PAUSE)
        assert given == [7]
        task.cancel()

    asyncio.run(story())
