"""An archive's bytes depend on the adapter's files alone; a place is free, and has room to spare, or is refused."""

import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from manylora.adapters.export.archive import SUFFIXES, write_archive
from manylora.adapters.export.errors import ExportRefused
from manylora.adapters.export.publish import SPARE_BYTES, check_space, check_target
from tests.adapters.making import write


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_neither_time_nor_permissions_change_an_archive(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = write(tmp_path / "adapter", files={"README.md": "read me"})
    made = []
    for number, (now, mode) in enumerate(((1e9, 0o644), (1.5e9, 0o600))):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        for path in adapter.iterdir():
            path.chmod(mode)
        # Below a directory each: gzip's header would hold the name.
        target = tmp_path / str(number) / f"adapter{suffix}"
        target.parent.mkdir()
        write_archive(adapter, target, "top")
        made.append(target.read_bytes())
    assert made[0] == made[1]


def test_a_link_to_nowhere_is_not_a_free_place(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ExportRefused, match="exists"):
        check_target(target)


def test_a_result_needs_its_size_and_some_to_spare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=SPARE_BYTES + 1000))
    check_space(tmp_path, 1000)
    with pytest.raises(ExportRefused, match="free"):
        check_space(tmp_path, 1001)
