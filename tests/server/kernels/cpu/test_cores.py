"""How many threads pay, and when they are held on their cores."""

from pathlib import Path

import pytest

from manylora.server.kernels.cpu import cores
from manylora.server.kernels.cpu.cores import Cores, find_cores


def test_threads_are_as_many_as_cores_or_as_the_container_may_use() -> None:
    assert Cores((0, 1, 2, 3), None).threads == 4
    assert Cores((0, 1, 2, 3), 2).threads == 2
    assert Cores((0, 1), 8).threads == 2
    assert Cores((), None).threads == 1


def test_only_threads_that_take_all_cores_are_held() -> None:
    mine = Cores((0, 2, 4, 6), None)
    assert mine.held(4) == (0, 2, 4, 6)
    assert mine.held(3) is None
    assert mine.held(5) is None
    assert Cores((0, 2, 4, 6), 2).held(4) is None
    assert Cores((3,), None).held(1) is None


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system of which nothing is known but that it has processors 0 to 3."""
    monkeypatch.setattr(cores, "TOPOLOGY", tmp_path / "cpu")
    monkeypatch.setattr(cores, "CGROUP_OF_SELF", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "CGROUPS", tmp_path / "cgroups")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3, 2, 1, 0}, raising=False)
    return tmp_path


def test_hyper_threads_of_a_core_count_once(system: Path) -> None:
    for processor, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        folder = system / "cpu" / f"cpu{processor}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    assert find_cores() == Cores((0, 1), None)


def test_a_system_that_tells_nothing_has_a_core_for_each_processor(system: Path) -> None:
    assert find_cores() == Cores((0, 1, 2, 3), None)


def test_the_least_limit_of_the_control_groups_counts(system: Path) -> None:
    (system / "cgroup").write_text("0::/pod/box\n")
    box = system / "cgroups" / "pod" / "box"
    box.mkdir(parents=True)
    (box / "cpu.max").write_text("max 100000\n")
    (box.parent / "cpu.max").write_text("150000 100000\n")
    assert find_cores() == Cores((0, 1, 2, 3), 2)
    (box / "cpu.max").write_text("50000 100000\n")
    assert find_cores().threads == 1
