"""The store and a power cut: what is renamed into place is on the disk before, what is removed goes in one rename."""

import os
import shutil
from pathlib import Path

import pytest

from manylora.adapters.errors import AdapterError, AdapterNotFound
from manylora.adapters.sources.local import LocalSource
from manylora.adapters.store import AdapterStore
from tests.adapters.making import write


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", files={"chat_template.jinja": "{{ x }}"})


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """What is synced and renamed, in order: the name, and the bytes that were there by then."""
    events: list[tuple[str, str, int]] = []
    fsync, rename = os.fsync, Path.rename

    def syncing(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        events.append(("sync", path.name, os.fstat(handle).st_size if path.is_file() else 0))
        fsync(handle)

    def renaming(path: Path, target: Path) -> Path:
        events.append(("rename", Path(target).name, 0))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "rename", renaming)
    return events


def test_files_and_their_directory_are_on_the_disk_before_they_are_published(
    store: AdapterStore, source: Path, journal: list[tuple[str, str, int]]
) -> None:
    staged = store.stage(LocalSource(source))
    store.publish(staged)
    published = journal.index(("rename", staged.digest, 0))
    before, after = journal[:published], journal[published + 1 :]
    for path in source.iterdir():
        assert ("sync", path.name, path.stat().st_size) in before, (
            f"{path.name} may be empty after a power cut"
        )
    assert ("sync", staged.path.name, 0) in before, "names of files may be gone after a power cut"
    assert ("sync", "store", 0) in after, (
        "the adapter may be gone after a power cut, though it was registered"
    )


def test_a_removal_that_is_cut_short_leaves_nothing_under_the_digest(
    store: AdapterStore, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = store.stage(LocalSource(source)).digest
    store.publish(store.stage(LocalSource(source)))
    monkeypatch.setattr(
        shutil, "rmtree", lambda *_args, **_more: None
    )  # the power goes before a file is deleted
    store.remove(digest)
    with pytest.raises(AdapterNotFound):
        store.path_of(digest)
    monkeypatch.undo()
    assert AdapterStore(tmp_path / "store").sweep(()) > 0
    assert [path.name for path in (tmp_path / "store").rglob("*")] == [".staging"]


def test_what_was_removed_is_hashed_anew_when_it_is_back(
    store: AdapterStore, source: Path, tmp_path: Path
) -> None:
    staged = store.stage(LocalSource(source))
    digest, path = staged.digest, store.publish(staged)
    shutil.copytree(path, tmp_path / "kept")
    store.remove(digest)
    (tmp_path / "kept" / "adapter_model.safetensors").write_bytes(b"damaged")
    shutil.copytree(tmp_path / "kept", path)
    assert not store.is_intact(digest)
    with pytest.raises(AdapterError):
        store.verify(digest)
