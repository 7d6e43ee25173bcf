"""Adapters from object stores, with fsspec's file system in memory in the place of a store."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from manylora.adapters.errors import (
    AdapterNotFound,
    InvalidAdapter,
    SourceUnreachable,
    UnsupportedAdapter,
)
from manylora.adapters.files import digest_of
from manylora.adapters.sources import objects
from manylora.adapters.sources.allowed import Allowed
from manylora.adapters.sources.finding import Finding, Offer
from manylora.adapters.sources.web import WebLimits
from manylora.adapters.store import AdapterStore
from tests.adapters.sources.test_web import archived

LIMIT = 1 << 20
WEIGHTS = "/bucket/models/a/adapter_model.safetensors"


class Bucket(MemoryFileSystem):  # type: ignore[misc]  # it ships no types
    """Objects that can be read badly."""

    protocol = ("s3",)
    store: dict[str, Any] = {}  # noqa: RUF012  # fsspec's own
    pseudo_dirs: list[str] = [""]  # noqa: RUF012
    failing: list[Exception] = []  # noqa: RUF012
    pieces: list[tuple[int, int]] = []  # noqa: RUF012

    def cat_file(self, path: str, start: int, end: int) -> bytes:
        self.pieces.append((start, end))
        if self.failing:
            raise self.failing.pop(0)
        found: bytes = super().cat_file(path, start=start, end=end)
        return found


@pytest.fixture
def bucket(adapter: Path) -> Iterator[Bucket]:
    before = fsspec.registry.get("s3")
    fsspec.register_implementation("s3", Bucket, clobber=True)
    files = Bucket()
    for path in adapter.iterdir():
        files.pipe_file(f"/bucket/models/a/{path.name}", path.read_bytes())
    files.pipe_file("/bucket/models/a.tar.gz", archived(adapter, "tar.gz"))
    yield files
    Bucket.store.clear()
    Bucket.failing.clear()
    Bucket.pieces.clear()
    fsspec.register_implementation("s3", before or "s3fs.S3FileSystem", clobber=True)


@pytest.fixture
def finding(tmp_path: Path) -> Finding:
    limits = WebLimits(seconds=30.0, pauses=(0.0, 0.0))
    return Finding(tmp_path, allowed=Allowed.of(["s3://bucket/models/", "gs://bucket"]), limits=limits)


@pytest.mark.parametrize(
    "src", ["s3://bucket/models/a", "s3://bucket/models/a/", "s3://bucket/models/a.tar.gz"]
)
def test_objects_come_over_with_their_digest(
    finding: Finding, store: AdapterStore, bucket: Bucket, adapter: Path, src: str
) -> None:
    source = finding.find(Offer(src))
    staged = store.stage(source)
    assert staged.digest == digest_of(adapter, LIMIT)
    assert staged.identity == source.identify(LIMIT)


def test_a_piece_that_fails_is_asked_for_again(
    finding: Finding, store: AdapterStore, bucket: Bucket, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "PIECE", 1000)
    Bucket.failing += [TimeoutError("slow"), OSError("gone")]
    assert store.stage(finding.find(Offer("s3://bucket/models/a"))).digest == digest_of(adapter, LIMIT)
    assert Bucket.pieces[0] == Bucket.pieces[1] == Bucket.pieces[2]
    assert max(end - start for start, end in Bucket.pieces) == 1000
    Bucket.failing += [OSError("https://signed?s3cret")] * 3
    with pytest.raises(SourceUnreachable, match="OSError") as refused:
        store.stage(finding.find(Offer("s3://bucket/models/a")))
    assert "s3cret" not in str(refused.value)


def test_an_object_that_changes_while_it_is_read_is_refused(
    finding: Finding, store: AdapterStore, bucket: Bucket
) -> None:
    def change(done: int, total: int | None) -> None:
        if done:
            bucket.pipe_file("/bucket/models/a/adapter_config.json", b"{}")

    with pytest.raises(InvalidAdapter, match="changed"):
        store.stage(finding.find(Offer("s3://bucket/models/a")), change)


def test_nothing_there_and_too_much_there(finding: Finding, store: AdapterStore, bucket: Bucket) -> None:
    with pytest.raises(AdapterNotFound, match="adapter_config"):
        store.stage(finding.find(Offer("s3://bucket/models/none")))
    with pytest.raises(AdapterNotFound, match=r"none\.zip"):
        store.stage(finding.find(Offer("s3://bucket/models/none.zip")))
    bucket.pipe_file(WEIGHTS, bytes(2 << 20))
    with pytest.raises(InvalidAdapter, match="at most"):
        store.stage(finding.find(Offer("s3://bucket/models/a")))


def test_who_may_not_list_reads_what_is_there(
    finding: Finding, store: AdapterStore, bucket: Bucket, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = Bucket.info

    def told_nothing(self: Bucket, path: str) -> Any:
        try:
            return info(self, path)
        except FileNotFoundError:
            raise PermissionError("Forbidden") from None

    monkeypatch.setattr(Bucket, "info", told_nothing)
    assert store.stage(finding.find(Offer("s3://bucket/models/a"))).digest == digest_of(adapter, LIMIT)
    with pytest.raises(SourceUnreachable, match="PermissionError"):
        store.stage(finding.find(Offer("s3://bucket/models/none")))


def test_a_library_that_is_missing_is_named_with_its_extra(finding: Finding, store: AdapterStore) -> None:
    with pytest.raises(UnsupportedAdapter, match=r"gcsfs.*pip install 'manylora\[gs\]'"):
        store.stage(finding.find(Offer("gs://bucket/a")))
