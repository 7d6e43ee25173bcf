"""Sources: directories inside the root, however they are written, and nothing else."""

import os
import shutil
from pathlib import Path

import pytest

from manylora.adapters.errors import (
    AdapterError,
    AdapterNotFound,
    AdapterPathForbidden,
    InvalidAdapter,
    UnsupportedAdapter,
)
from manylora.adapters.files import digest_of
from manylora.adapters.sources.local import operator_source, resolve_source
from manylora.adapters.store import AdapterStore
from tests.adapters.making import write

LIMIT = 1 << 20


def hub_cache(repository: Path, adapter: Path) -> Path:
    """Lay an adapter out as the hub's cache does; returns the snapshot: links into ../../blobs."""
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(adapter.iterdir())):
        shutil.copy(path, repository / "blobs" / f"{number:064}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064}")
    return snapshot


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "root" / "an adapter")
    write(tmp_path / "outside")
    return tmp_path / "root"


def test_paths_and_file_urls_inside_the_root(root: Path) -> None:
    wanted = (root / "an adapter").resolve()
    (root / "link").symlink_to("an adapter")
    for src in (str(wanted), "an adapter", f"{root}/x/../an adapter", "link", f"file://{root}/an%20adapter"):
        assert resolve_source(src, root).directory == wanted
    assert resolve_source(f"file://localhost{root}/an%20adapter", root).directory == wanted


def test_nothing_outside_the_root(root: Path, tmp_path: Path) -> None:
    (root / "way_out").symlink_to(tmp_path / "outside")
    for src in (
        "way_out",
        "../outside",
        str(tmp_path / "outside"),
        "/nowhere",
        f"file://{root}/%2e%2e/outside",
    ):
        with pytest.raises(AdapterPathForbidden):
            resolve_source(src, root)


def test_no_link_inside_leads_out(root: Path, tmp_path: Path) -> None:
    weights = root / "an adapter" / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(tmp_path / "outside" / "adapter_model.safetensors")
    source = resolve_source("an adapter", root)
    with pytest.raises(AdapterPathForbidden, match="adapter_model"):
        source.open(LIMIT)


def test_links_inside_the_root_are_followed_as_in_a_hub_s_cache(root: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(root / "models--o--n", tmp_path / "outside")
    (root / "dangling").mkdir()
    shutil.copy(snapshot / "adapter_config.json", root / "dangling")
    (root / "dangling" / "adapter_model.safetensors").symlink_to("nowhere")
    with resolve_source(str(snapshot), root).open(LIMIT) as files:
        assert files.read_through(lambda name: lambda chunk: None) == digest_of(tmp_path / "outside", LIMIT)
    with pytest.raises(InvalidAdapter, match="missing"):
        resolve_source("dangling", root).open(LIMIT)


def test_what_the_operator_names_may_have_links_anywhere(root: Path, tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path / "cache" / "models--o--n", tmp_path / "outside")
    (root / "to_cache").symlink_to(snapshot)
    for directory in (snapshot, root / "to_cache"):
        with operator_source(directory).open(LIMIT) as files:
            assert len(files.sizes) == 2
    with pytest.raises(AdapterPathForbidden):
        resolve_source("to_cache", root)
    with pytest.raises(AdapterNotFound, match="nowhere"):
        operator_source(tmp_path / "nowhere")


def test_a_relative_path_starts_at_the_root_or_where_the_server_was_started(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = root / "an adapter"
    for src in ("an adapter", "root/an adapter", "./root/an adapter"):
        assert resolve_source(src, root).directory == wanted
    write(root / "root" / "an adapter", seed=1)
    assert resolve_source("root/an adapter", root).directory == root / "root" / "an adapter"
    for src, kind in (("outside", AdapterNotFound), ("../outside", AdapterPathForbidden)):
        with pytest.raises(kind):
            resolve_source(src, root)


def swap_for_link(path: Path, target: Path) -> None:
    """What an attacker does between two system calls."""
    path.rename(path.with_name(f"{path.name}-before"))
    path.symlink_to(target)


@pytest.mark.parametrize("part", ["a", "a/b"])
def test_a_directory_swapped_for_a_link_after_the_check_is_not_entered(
    root: Path, tmp_path: Path, part: str
) -> None:
    write(root / "a" / "b" / "c")
    write(tmp_path / "elsewhere" / "b" / "c", seed=1)
    write(tmp_path / "elsewhere" / "c", seed=1)
    source = resolve_source("a/b/c", root)
    swap_for_link(root / part, tmp_path / "elsewhere")
    with pytest.raises(AdapterPathForbidden, match="link"):
        source.open(LIMIT)
    store = AdapterStore(tmp_path / "store")
    with pytest.raises(AdapterPathForbidden):
        store.stage(source)
    assert list((tmp_path / "store" / ".staging").iterdir()) == []


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_swapped_for_a_link_at_the_last_moment_is_not_opened(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, linked: bool
) -> None:
    """The swap comes when the file itself is about to be opened: after whatever was looked up or checked."""
    secret = tmp_path / "outside" / name
    victim = root / "an adapter" / name
    if linked:  # the file that a link inside the root leads to is swapped
        (root / "blobs").mkdir()
        victim.rename(root / "blobs" / "f00")
        victim.symlink_to("../blobs/f00")
        victim = root / "blobs" / "f00"
    real = os.open

    def at_the_last_moment(path: object, flags: int, *more: object, **named: object) -> int:
        if path == victim.name and not victim.is_symlink():
            swap_for_link(victim, secret)
        return real(path, flags, *more, **named)  # type: ignore[arg-type]  # what was given

    source = resolve_source("an adapter", root)
    monkeypatch.setattr(os, "open", at_the_last_moment)
    with pytest.raises(AdapterPathForbidden):
        source.open(LIMIT)
    assert victim.is_symlink(), "it was swapped"


def test_what_was_checked_is_what_is_read(root: Path, tmp_path: Path) -> None:
    before = digest_of(root / "an adapter", LIMIT)
    write(tmp_path / "outside", seed=1)
    with resolve_source("an adapter", root).open(LIMIT) as files:
        swap_for_link(root / "an adapter" / "adapter_model.safetensors", tmp_path / "outside")
        swap_for_link(root / "an adapter", tmp_path / "outside")
        assert files.read_through(lambda name: lambda chunk: None) == before


@pytest.mark.parametrize(
    ("src", "kind", "why"),
    [
        ("s3://bucket/adapter", UnsupportedAdapter, "s3://"),
        ("https://host/adapter", UnsupportedAdapter, "file://"),
        ("organisation/adapter", AdapterNotFound, "hub"),
        ("an adapter/adapter_config.json", AdapterNotFound, "directory"),
        ("loop", AdapterNotFound, "loop"),
        ("", InvalidAdapter, "empty"),
        ("a\0b", InvalidAdapter, "NUL"),
        ("file:///a%00b", InvalidAdapter, "NUL"),
        ("file://host/path", InvalidAdapter, "file URL"),
    ],
)
def test_other_sources_are_refused(root: Path, src: str, kind: type[AdapterError], why: str) -> None:
    (root / "loop").symlink_to("loop")
    with pytest.raises(kind, match=why):
        resolve_source(src, root)
