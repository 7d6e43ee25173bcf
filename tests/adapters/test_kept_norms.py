"""Row norms that are kept: computed once for an adapter and a form of the base, and again when they aren't whole."""

import contextlib
import errno
from pathlib import Path

import pytest
import torch
from torch import Tensor

from manylora.adapters.kept_norms import KeptNorms
from manylora.adapters.store import AdapterStore

DIGEST, OTHER = "a" * 64, "b" * 64
A, B = torch.ones(2, 4), torch.ones(3, 2)


class Base:
    """Says how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def bias(self, path: str) -> Tensor:
        return torch.zeros(len(path))

    def row_norms(self, path: str, a: Tensor, b: Tensor) -> Tensor:
        self.asked.append(path)
        return torch.arange(len(b)) + float(len(path))


@pytest.fixture
def base() -> Base:
    return Base()


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters")


def ask(base: Base, store: AdapterStore, form: str = "nf4", digest: str = DIGEST) -> list[Tensor]:
    with KeptNorms(base, form, store.derived).of(digest) as found:
        return [found.row_norms(path, A, B) for path in ("q", "down")]


def kept(store: AdapterStore) -> list[Path]:
    return sorted(store.derived(DIGEST, "x").parent.glob("*"))


def test_what_was_computed_is_not_computed_again(base: Base, store: AdapterStore) -> None:
    first = ask(base, store)
    assert all(map(torch.equal, ask(base, store), first))
    assert base.asked == ["q", "down"]


def test_another_adapter_and_another_form_have_their_own(base: Base, store: AdapterStore) -> None:
    for form, digest in (("nf4", DIGEST), ("nf4", OTHER), ("int8", DIGEST)):
        ask(base, store, form, digest)
    assert len(base.asked) == 6
    assert len(kept(store)) == 3


def test_nothing_is_kept_of_a_read_that_failed(base: Base, store: AdapterStore) -> None:
    with contextlib.suppress(ValueError), KeptNorms(base, "nf4", store.derived).of(DIGEST) as found:
        found.row_norms("q", A, B)
        raise ValueError
    assert base.asked
    assert not kept(store)


@pytest.mark.parametrize("spoil", ["cut", "changed", "emptied"])
def test_what_is_damaged_is_computed_again(base: Base, store: AdapterStore, spoil: str) -> None:
    first = ask(base, store)
    [path] = kept(store)
    content = bytearray(path.read_bytes())
    if spoil == "changed":
        content[-1] ^= 1
    path.write_bytes(bytes({"cut": content[:-1], "changed": content, "emptied": b""}[spoil]))
    assert all(map(torch.equal, ask(base, store), first))
    assert len(base.asked) == 4
    ask(base, store)
    assert len(base.asked) == 4


def test_norms_of_another_shape_are_not_taken(base: Base, store: AdapterStore) -> None:
    ask(base, store)
    with KeptNorms(base, "nf4", store.derived).of(DIGEST) as found:
        assert len(found.row_norms("q", A, torch.ones(5, 2))) == 5


def test_a_place_that_cannot_be_written_costs_time_only(base: Base, store: AdapterStore) -> None:
    store.derived(DIGEST, "x").parent.write_text("a file")
    ask(base, store)
    ask(base, store)
    assert len(base.asked) == 4


def test_nothing_half_written_is_left(
    base: Base, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("manylora.adapters.kept_norms.save_file", full)
    ask(base, store)
    assert list(store.derived(DIGEST, "x").parent.iterdir()) == []


def test_they_go_with_the_adapter(base: Base, store: AdapterStore) -> None:
    ask(base, store)
    ask(base, store, digest=OTHER)
    store.remove(DIGEST)
    [left] = kept(store)
    assert left.name.startswith(OTHER)
    store.sweep({OTHER})
    assert kept(store) == [left]
    store.sweep(())
    assert not kept(store)
