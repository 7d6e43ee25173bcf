"""A batch through kill -9, in its small form."""

from pathlib import Path

from manylora.loadtest.checks.batch_kills import run
from manylora.loadtest.material.checkpoints import write_base


def test_each_line_is_answered_once_though_the_server_is_killed(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    arguments = ("--kv-cache-gib", "0.02", "--arena-rows", "64", "--threads", "1")
    found = run(base, tmp_path, lines=300, kills=1, seed=1, tokens=4, arguments=arguments)
    assert found.holds, found
    assert len(found.killed_at) == 1
    assert 0 < found.killed_at[0] < 300
