"""`manylora cache`: what servers keep for their next start is shown, read through and deleted."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from manylora.cli import app
from manylora.server.model.kept_model import KeptModel
from manylora.server.model.weight_cache import WEIGHTS, WeightCache

ONE, TWO, NEAR_TWO = "1" * 32, "2" * 32, "2" * 31 + "3"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory with three kept models of a megabyte."""
    cache = WeightCache(tmp_path / WEIGHTS, 1 << 30)
    for key in (ONE, TWO, NEAR_TWO):
        model = KeptModel({}, {"codes": torch.zeros(1 << 20, dtype=torch.uint8)})
        cache.keep_later(key, model, {"base": f"/models/[{key[0]}]", "weights": "nf4"})
    cache.write()
    return tmp_path


def run(data: Path, *words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["cache", *words, "--data-dir", str(data)])
    return result.exit_code, result.output


def kept(data: Path) -> set[str]:
    return {entry.key for entry in WeightCache(data / WEIGHTS, 0).entries()}


def test_ls_shows_what_is_kept(data: Path) -> None:
    status, text = run(data, "ls")
    lines = text.splitlines()
    assert status == 0
    assert len(lines) == 4
    assert any("111111111111 " in line and " 1 " in line and "/models/[1]" in line for line in lines)


def test_ls_of_nothing(tmp_path: Path) -> None:
    assert run(tmp_path, "ls")[0] == 0


def test_ls_tells_a_broken_file(data: Path) -> None:
    (data / WEIGHTS / f"{ONE}.weights").write_bytes(b"x" * 100)
    status, text = run(data, "ls")
    assert status == 0
    assert "broken: " in text


def test_rm_takes_a_beginning_of_a_key(data: Path) -> None:
    assert run(data, "rm", "111") == (0, f"deleted {ONE}\n")
    assert kept(data) == {TWO, NEAR_TWO}


def test_rm_all(data: Path) -> None:
    assert run(data, "rm", "--all")[0] == 0
    assert kept(data) == set()


@pytest.mark.parametrize(
    ("words", "told"),
    [((), "name a key"), (("2",), "several keys"), (("9",), "no weights are kept under it")],
)
def test_what_cannot_be_meant_deletes_nothing(words: tuple[str, ...], told: str, data: Path) -> None:
    status, text = run(data, "rm", *words)
    assert status == 2
    assert told in text
    assert len(text.splitlines()) == 1
    assert len(kept(data)) == 3


def test_check_reads_all_and_says_what_is_damaged(data: Path) -> None:
    assert run(data, "check", "--all")[0] == 0
    path = data / WEIGHTS / f"{TWO}.weights"
    raw = bytearray(path.read_bytes())
    raw[1 << 19] ^= 1
    path.write_bytes(raw)
    status, text = run(data, "check", "--all")
    assert status == 1
    assert f"{TWO} is damaged" in text
    assert f"{ONE} is sound" in text
