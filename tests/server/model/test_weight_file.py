"""A file of tensors is read back as it was written, mapped, or refused with what is wrong with it."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from manylora.server.model.weight_file import ALIGNED, DTYPES, BrokenFile, open_file, write_file

FACTS = {"key": "k", "about": {"base": "Qwen α"}}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {
        f"{name} {size}": (torch.rand(size, 3, generator=generator) * 100).to(dtype)
        for name, dtype in DTYPES.items()
        for size in (1, 7, 64)
    }
    return {
        **found,
        "none": torch.empty(0),
        "one": torch.tensor(1.5),
        "turned": torch.arange(6).view(2, 3).T.int(),
    }


def write(path: Path) -> Path:
    with path.open("wb") as file:
        write_file(file, tensors(), FACTS)
    return path


def rewrite_index(path: Path, change: Any) -> None:
    """Give the file another index, with the digest that belongs to it."""
    raw = path.read_bytes()
    end = struct.Struct("<16sQqq24s")
    magic, version, at, length, _ = end.unpack(raw[-end.size :])
    index = json.loads(raw[at : at + length])
    text = json.dumps(change(index)).encode()
    digest = hashlib.sha256(text).digest()[:24]
    path.write_bytes(raw[:at] + text + end.pack(magic, version, at, len(text), digest))


def test_what_was_written_is_shown(tmp_path: Path) -> None:
    file = open_file(write(tmp_path / "file"))
    assert file.facts == FACTS
    assert file.nbytes == (tmp_path / "file").stat().st_size
    assert file.tensors.keys() == tensors().keys()
    for name, tensor in tensors().items():
        shown = file.tensors[name]
        assert shown.dtype == tensor.dtype
        assert torch.equal(shown, tensor)
        assert shown.data_ptr() % ALIGNED == 0
    assert file.damaged() is None


def test_it_is_mapped_to_be_shared_and_read_only(tmp_path: Path) -> None:
    path = write(tmp_path / "file")
    file = open_file(path)
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
    assert [line.split()[1] for line in lines] == ["r--s"]
    held = file.tensors["one"]
    del file
    path.unlink()
    assert float(held) == 1.5
    del held
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    raw = write(tmp_path / "file").read_bytes()
    for length in {0, 1, 63, 64, 4096, len(raw) // 2, len(raw) - 64, len(raw) - 1}:
        (tmp_path / "cut").write_bytes(raw[:length])
        with pytest.raises(BrokenFile):
            open_file(tmp_path / "cut")
    for other in (raw + b"\0", b"{}" * 100, raw[64:]):
        (tmp_path / "cut").write_bytes(other)
        with pytest.raises(BrokenFile):
            open_file(tmp_path / "cut")


def test_every_damaged_bit_of_index_and_end_is_found(tmp_path: Path) -> None:
    raw = bytearray(write(tmp_path / "file").read_bytes())
    begin = struct.unpack("<q", raw[-40:-32])[0]
    for place in (*range(begin, len(raw), 97), *range(len(raw) - 64, len(raw))):
        raw[place] ^= 1 << place % 8
        (tmp_path / "bad").write_bytes(raw)
        with pytest.raises(BrokenFile):
            open_file(tmp_path / "bad")
        raw[place] ^= 1 << place % 8


def test_a_damaged_tensor_is_found_by_reading_all(tmp_path: Path) -> None:
    path = write(tmp_path / "file")
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1
    path.write_bytes(raw)
    assert open_file(path).damaged() == next(iter(tensors()))


@pytest.mark.parametrize(
    "entry",
    [
        {"at": -64},
        {"at": 1},
        {"at": 1 << 40},
        {"shape": [1 << 40]},
        {"shape": [-1]},
        {"shape": 3},
        {"dtype": "float64"},
        {"at": None},
    ],
)
def test_nothing_beyond_the_tensors_is_shown(entry: dict[str, Any], tmp_path: Path) -> None:
    def change(index: dict[str, Any]) -> dict[str, Any]:
        index["tensors"]["one"].update(entry)
        return index

    path = write(tmp_path / "file")
    rewrite_index(path, lambda index: index)
    assert open_file(path).damaged() is None
    rewrite_index(path, change)
    with pytest.raises(BrokenFile):
        open_file(path)


@pytest.mark.parametrize("index", [{}, {"tensors": {}}, {"tensors": [], "facts": {}}, [], 1])
def test_another_index_is_refused(index: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "file")
    rewrite_index(path, lambda _: index)
    with pytest.raises(BrokenFile):
        open_file(path)
