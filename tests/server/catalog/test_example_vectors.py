"""Vectors of examples, kept: read again when all is as it was, and made anew when anything is not."""

from pathlib import Path

import numpy as np
import pytest

from manylora.server.catalog.example_vectors import ExampleVectors, Vectors

HIDDEN = 4
COUNTS = {"chat": 2, "plain": 2}
ONE, TWO = "a" * 64, "b" * 64


def vectors() -> Vectors:
    return {form: np.arange(8, dtype=np.float16).reshape(2, HIDDEN) for form in COUNTS}


def opened(directory: Path | None, key: str = "k", most: int = 1 << 20) -> ExampleVectors:
    return ExampleVectors(directory, key, HIDDEN, most)


def test_the_next_start_reads_what_this_one_wrote(tmp_path: Path) -> None:
    opened(tmp_path).write(ONE, vectors())
    found = opened(tmp_path).read(ONE, COUNTS)
    assert found is not None
    assert all((found[form] == vectors()[form]).all() for form in COUNTS)
    assert opened(tmp_path).read(TWO, COUNTS) is None


def test_those_of_another_base_and_of_other_examples_are_not_read(tmp_path: Path) -> None:
    opened(tmp_path).write(ONE, vectors())
    assert opened(tmp_path, key="another").read(ONE, COUNTS) is None
    assert opened(tmp_path).read(ONE, {"chat": 3, "plain": 3}) is None
    assert opened(tmp_path).read(ONE, {**COUNTS, "third": 2}) is None
    assert ExampleVectors(tmp_path, "k", HIDDEN + 1, 1).read(ONE, COUNTS) is None


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no archive", None])
def test_what_is_damaged_counts_as_none(tmp_path: Path, damage: bytes | None) -> None:
    opened(tmp_path).write(ONE, vectors())
    path = tmp_path / f"{ONE}.npz"
    path.write_bytes(path.read_bytes()[:-40] if damage is None else damage)
    assert opened(tmp_path).read(ONE, COUNTS) is None


def test_states_that_are_no_numbers_are_not_read(tmp_path: Path) -> None:
    broken = {**vectors(), "chat": np.full((2, HIDDEN), np.nan, dtype=np.float16)}
    opened(tmp_path).write(ONE, broken)
    assert opened(tmp_path).read(ONE, COUNTS) is None


def test_what_is_nobodys_goes_from_memory_and_disk(tmp_path: Path) -> None:
    kept = opened(tmp_path)
    for digest in (ONE, TWO):
        kept.write(digest, vectors())
        kept.hold(digest, vectors())
    (tmp_path / f".{ONE}.1.partial").write_bytes(b"killed")
    kept.keep_only({TWO})
    assert [path.name for path in tmp_path.iterdir()] == [f"{TWO}.npz"]
    assert ONE not in kept
    assert TWO in kept


def test_memory_is_bounded() -> None:
    size = sum(each.nbytes for each in vectors().values())
    kept = opened(None, most=size)
    assert kept.has_room(4)
    kept.hold(ONE, vectors())
    assert kept.nbytes == size
    assert not kept.has_room(1)
    kept.keep_only(())
    assert kept.has_room(4)


def test_without_a_place_nothing_is_kept() -> None:
    kept = opened(None)
    kept.write(ONE, vectors())
    assert kept.read(ONE, COUNTS) is None
    kept.keep_only(())
