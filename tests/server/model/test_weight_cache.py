"""Kept weights are found whole or not at all, within bounds, and nothing about them ends a start."""

import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pytest
import torch

from manylora.server.model import weight_cache
from manylora.server.model.kept_model import KeptModel
from manylora.server.model.weight_cache import Entry, WeightCache
from manylora.server.model.weight_file import BrokenFile, write_file

KIB = 1 << 10
ONE, TWO, THREE = ("0123456789abcdef" * 2, "1" * 32, "2" * 32)


def model(kib: int = 64, value: int = 1) -> KeptModel:
    return KeptModel(
        {"layer": {"parts": []}}, {"layer/codes": torch.full((kib * KIB,), value, dtype=torch.uint8)}
    )


def keep(cache: WeightCache, key: str, kept: KeptModel | None = None) -> None:
    cache.keep_later(key, kept or model(), {"base": "b"})
    cache.write()


def found(cache: WeightCache, key: str) -> KeptModel | None:
    return cache.find(key, lambda kept: kept)


def used(directory: Path, key: str, seconds: float) -> None:
    os.utime(directory / f"{key}.weights", (seconds, seconds))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "weights"


@pytest.fixture
def cache(directory: Path) -> WeightCache:
    return WeightCache(directory, 1 << 20)


def test_what_is_kept_is_found(cache: WeightCache, directory: Path) -> None:
    assert found(cache, ONE) is None
    keep(cache, ONE)
    assert [path.name for path in directory.iterdir()] == [f"{ONE}.weights"]
    kept = found(WeightCache(directory, 1 << 20), ONE)
    assert kept is not None
    assert kept.facts == model().facts
    assert torch.equal(kept.tensors["layer/codes"], model().tensors["layer/codes"])
    assert found(cache, TWO) is None
    assert cache.about(ONE) == {"base": "b"}
    cache.check(ONE)


def test_nothing_is_written_before_it_is_asked_for(cache: WeightCache, directory: Path) -> None:
    cache.keep_later(ONE, model(), {})
    assert not directory.exists()
    cache.write()
    cache.write()
    assert len(cache.entries()) == 1


@pytest.mark.parametrize("spoil", ["cut", "another file", "another key", "not a model"])
def test_a_broken_file_is_thrown_away_and_told(
    spoil: str, cache: WeightCache, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keep(cache, ONE)
    path = directory / f"{ONE}.weights"
    key = ONE
    if spoil == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif spoil == "another file":
        path.write_bytes(b"x" * 1000)
    elif spoil == "another key":
        key = TWO
        path.rename(directory / f"{TWO}.weights")

    def refuse(kept: KeptModel) -> KeptModel:
        raise ValueError("codes are missing")

    assert cache.find(key, refuse if spoil == "not a model" else lambda kept: kept) is None
    assert "thrown away and made anew" in caplog.text
    assert not list(directory.iterdir())
    keep(cache, key)
    assert found(cache, key) is not None


def test_the_longest_unused_make_room(directory: Path) -> None:
    cache = WeightCache(directory, 180 * KIB)
    for age, key in enumerate((ONE, TWO)):
        keep(cache, key)
        used(directory, key, 1000.0 + age)
    assert found(cache, ONE) is not None  # which is a use
    keep(cache, THREE)
    assert [entry.key for entry in cache.entries()] == [THREE, ONE]
    assert sum(entry.nbytes for entry in cache.entries()) <= 180 * KIB


def test_room_is_made_before_anything_is_written(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = WeightCache(directory, 100 * KIB)
    keep(cache, ONE)
    seen: list[list[Entry]] = []

    def look(file: BinaryIO, *more: Any) -> None:
        seen.append(cache.entries())
        write_file(file, *more)

    monkeypatch.setattr(weight_cache, "write_file", look)
    keep(cache, TWO)
    assert seen == [[]]
    assert [entry.key for entry in cache.entries()] == [TWO]


def test_a_lower_bound_is_held_at_the_next_start(directory: Path) -> None:
    keep(WeightCache(directory, 1 << 20), ONE)
    keep(WeightCache(directory, 1 << 20), TWO)
    used(directory, ONE, 1000)
    lower = WeightCache(directory, 100 * KIB)
    lower.write()
    assert [entry.key for entry in lower.entries()] == [TWO]


def test_what_is_larger_than_the_bound_takes_nobodys_place(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = WeightCache(directory, 100 * KIB)
    keep(cache, ONE)
    keep(cache, TWO, model(kib=200))
    assert [entry.key for entry in cache.entries()] == [ONE]
    assert "aren't kept for the next start" in caplog.text


class Usage(NamedTuple):
    free: int


def test_a_disk_without_room_is_told(
    cache: WeightCache, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 20))
    keep(cache, ONE)
    assert "can't be kept for the next start" in caplog.text
    assert not list(directory.iterdir())


def test_a_disk_that_fills_up_is_told_and_left_as_it_was(
    cache: WeightCache, directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fill(file: Any, *ignored: object) -> None:
        file.write(b"some")
        file.flush()
        assert len(list(directory.iterdir())) == 1
        WeightCache(directory, 1 << 20).sweep()  # another process's
        assert len(list(directory.iterdir())) == 1
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(weight_cache, "write_file", fill)
        keep(cache, ONE)
    assert "No space left on device" in caplog.text
    assert not list(directory.iterdir())
    keep(cache, ONE)
    assert found(cache, ONE) is not None


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "weights").write_text("a file")
    cache = WeightCache(tmp_path / "weights", 1 << 20)
    assert found(cache, ONE) is None
    keep(cache, ONE)
    assert "can't be kept" in caplog.text
    assert cache.entries() == []


def test_what_a_crash_left_is_swept_and_what_is_being_written_is_not(
    cache: WeightCache, directory: Path
) -> None:
    directory.mkdir()
    left, under_way = directory / "left.partial", directory / "going.partial"
    for path in (left, under_way):
        path.write_bytes(b"x")
    with under_way.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        cache.write()
        assert not left.exists()
        assert under_way.exists()


def test_other_files_are_let_be(cache: WeightCache, directory: Path) -> None:
    directory.mkdir()
    for name in ("notes.txt", "mine.weights"):
        (directory / name).write_text("x")
    WeightCache(directory, 1).sweep()
    assert len(list(directory.iterdir())) == 2
    assert cache.entries() == []


def test_a_deleted_file_stays_for_whoever_has_it_mapped(cache: WeightCache) -> None:
    keep(cache, ONE)
    kept = found(cache, ONE)
    assert cache.remove(ONE)
    assert not cache.remove(ONE)
    assert kept is not None
    assert int(kept.tensors["layer/codes"].sum()) == 64 * KIB


def test_entries_say_how_large_and_when_used(cache: WeightCache, directory: Path) -> None:
    keep(cache, ONE)
    used(directory, ONE, 1234)
    [entry] = cache.entries()
    assert entry == Entry(ONE, (directory / f"{ONE}.weights").stat().st_size, 1234)


def test_a_check_reads_all(cache: WeightCache, directory: Path) -> None:
    keep(cache, ONE)
    path = directory / f"{ONE}.weights"
    raw = bytearray(path.read_bytes())
    raw[1000] ^= 1
    path.write_bytes(raw)
    with pytest.raises(BrokenFile, match="layer/codes"):
        cache.check(ONE)


@pytest.mark.parametrize("key", ["", "../x", "A" * 32, "0" * 31])
def test_a_key_is_no_path(key: str, cache: WeightCache) -> None:
    with pytest.raises(BrokenFile, match="is no key"):
        cache.check(key)


@pytest.fixture(autouse=True)
def _all_levels(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.INFO):
        yield
