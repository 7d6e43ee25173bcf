"""A short form of the check of adapters' lives; and that it finds what it is to find."""

from pathlib import Path

import pytest

from manylora.adapters.lineage import Lineage
from manylora.loadtest.checks.adapter_life import walk
from manylora.loadtest.checks.life.kills import kill_servers
from manylora.loadtest.checks.life.truth import Diverged


async def test_nothing_diverges_in_a_short_life(tmp_path: Path) -> None:
    counts = await walk(tmp_path, 60, seed=3)
    assert counts["whole answers"] > 10
    assert counts["faults met"] > 0


async def test_a_version_that_answers_for_another_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lineage, "back_to", lambda self, version: self.without_canary())
    with pytest.raises(Diverged):
        await walk(tmp_path, 60, seed=3)


def test_what_was_acknowledged_outlives_a_kill(tmp_path: Path) -> None:
    counts = kill_servers(tmp_path, 2, seed=3)
    assert counts["kills"] == 2
