"""The store: whole directories by digest, and nothing left behind by what fails."""

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from manylora.adapters.errors import (
    AdapterError,
    AdapterNotFound,
    InvalidAdapter,
    StoreFull,
    UnsupportedAdapter,
)
from manylora.adapters.files import digest_of
from manylora.adapters.reader import read_adapter
from manylora.adapters.sources.local import LocalSource
from manylora.adapters.store import AdapterStore
from tests.adapters.making import MODULES, write


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "store")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", files={"chat_template.jinja": "{{ x }}", "README.md": "not copied"})


def everything(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.name != ".staging")


def test_publish_keeps_the_known_files_only(store: AdapterStore, source: Path, tmp_path: Path) -> None:
    staged = store.stage(LocalSource(source))
    with pytest.raises(AdapterNotFound):
        store.path_of(staged.digest)
    path = store.publish(staged)
    assert sorted(item.name for item in path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
    ]
    assert digest_of(source, 1 << 20) == staged.digest == path.name
    assert read_adapter(path, MODULES, max_rank=8, dtype=torch.float32).digest == staged.digest
    assert len(everything(tmp_path / "store")) == 4


def test_discard_leaves_nothing(store: AdapterStore, source: Path, tmp_path: Path) -> None:
    store.discard(store.stage(LocalSource(source)))
    assert everything(tmp_path / "store") == []


def test_concurrent_publishing_of_one_digest_is_one_copy(
    store: AdapterStore, source: Path, tmp_path: Path
) -> None:
    staged = [store.stage(LocalSource(source)) for _ in range(8)]
    gate = threading.Barrier(8)

    def publish(number: int) -> Path:
        gate.wait()
        return store.publish(staged[number])

    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(publish, range(8)))
    assert len(paths) == 1
    assert store.digests() == {staged[0].digest}
    assert len(everything(tmp_path / "store")) == 4


def test_deleting_works_where_not_even_a_name_finds_room(
    store: AdapterStore, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = store.publish(store.stage(LocalSource(source))).name

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "rename", full)
    store.remove(digest)
    assert everything(tmp_path / "store") == []


@pytest.mark.parametrize("call", ["fsync", "mkdir", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_nothing_behind(
    store: AdapterStore, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    def full(*_args: object, **_more: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(StoreFull, match="full"):
        store.publish(store.stage(LocalSource(source)))
    monkeypatch.undo()
    assert everything(tmp_path / "store") == []
    store.publish(store.stage(LocalSource(source)))


def test_a_disk_that_fills_up_during_a_write_leaves_nothing_behind(
    store: AdapterStore, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.open

    def on_full_disk(path: Path, mode: str = "r") -> IO[Any]:
        return real(Path("/dev/full"), "wb") if "x" in mode else real(path, mode)

    monkeypatch.setattr(Path, "open", on_full_disk)
    with pytest.raises(StoreFull, match="full"):
        store.stage(LocalSource(source))
    monkeypatch.undo()
    assert everything(tmp_path / "store") == []


def test_damage_is_noticed_and_healed_by_publishing_again(source: Path, tmp_path: Path) -> None:
    first = AdapterStore(tmp_path / "store")
    path = first.publish(first.stage(LocalSource(source)))
    (path / "adapter_model.safetensors").write_bytes(b"rotten")
    again = AdapterStore(tmp_path / "store")
    with pytest.raises(InvalidAdapter, match="damaged"):
        again.verify(path.name)
    again.publish(again.stage(LocalSource(source)))
    assert again.verify(path.name) == path
    (path / "adapter_config.json").unlink()
    with pytest.raises(InvalidAdapter, match="damaged"):
        AdapterStore(tmp_path / "store").verify(path.name)


def test_sweep_deletes_orphans_and_leftovers(store: AdapterStore, source: Path, tmp_path: Path) -> None:
    kept = store.publish(store.stage(LocalSource(source))).name
    write(source, seed=1)
    store.publish(store.stage(LocalSource(source)))
    store.stage(LocalSource(source))  # a crash came before it was published
    assert store.sweep({kept}) == 2
    assert store.digests() == {kept}
    assert list((tmp_path / "store" / ".staging").iterdir()) == []


def test_remove_is_idempotent(store: AdapterStore, source: Path) -> None:
    digest = store.publish(store.stage(LocalSource(source))).name
    store.remove(digest)
    store.remove(digest)
    with pytest.raises(AdapterNotFound):
        store.path_of(digest)
    with pytest.raises(AdapterNotFound):
        store.path_of(digest)


def _pipe(source: Path) -> None:
    (source / "added_tokens.json").unlink(missing_ok=True)
    os.mkfifo(source / "added_tokens.json")


def _no_weights(source: Path) -> None:
    (source / "adapter_model.safetensors").unlink()


def _pickled(source: Path) -> None:
    (source / "adapter_model.safetensors").rename(source / "adapter_model.bin")


def _huge_text(source: Path) -> None:
    with (source / "tokenizer_config.json").open("wb") as file:
        file.truncate(17 << 20)


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (_pipe, InvalidAdapter),
        (_no_weights, InvalidAdapter),
        (_pickled, UnsupportedAdapter),
        (_huge_text, InvalidAdapter),
    ],
)
def test_what_is_no_adapter_is_not_staged(
    store: AdapterStore, source: Path, tmp_path: Path, spoil: Callable[[Path], None], kind: type[AdapterError]
) -> None:
    spoil(source)
    with pytest.raises(kind):
        store.stage(LocalSource(source))
    assert everything(tmp_path / "store") == []


def test_the_total_size_is_limited(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapter, match="at most 100"):
        AdapterStore(tmp_path / "store", max_bytes=100).stage(LocalSource(source))


@pytest.mark.parametrize("digest", ["../x", "", "A" * 64, ".staging"])
def test_only_digests_are_looked_up(store: AdapterStore, digest: str) -> None:
    with pytest.raises(AdapterNotFound):
        store.path_of(digest)
    with pytest.raises(AdapterNotFound):
        store.remove(digest)
