"""A model is told from another by config.json and weights, wherever its files are and whenever they were written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from manylora.quant.errors import CorruptCheckpoint
from manylora.quant.identity import SAMPLE, SAMPLES, weights_identity
from manylora.quant.weight_files import INDEX, SINGLE

BIG = SAMPLE * SAMPLES // 4
"""Floats of a tensor that is just read whole."""


def write(directory: Path, **more: Tensor) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.arange(float(BIG)), "b": torch.zeros(3, BIG), **more}, directory / SINGLE)
    return directory


def changed(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> str:
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE)
    return weights_identity(directory)


def set_value(name: str, *index: int) -> Callable[[dict[str, Tensor]], object]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][index] = 7.5

    return change


def test_a_copy_elsewhere_of_another_time_is_the_same_model(tmp_path: Path) -> None:
    one = write(tmp_path / "one")
    two = Path(shutil.copytree(one, tmp_path / "further" / "two"))
    os.utime(two / SINGLE, (1, 1))
    (two / "README.md").write_text("beside it")
    assert weights_identity(one) == weights_identity(two)
    assert len(weights_identity(one)) == 64


@pytest.mark.parametrize(
    "change",
    [
        set_value("a", 0),
        set_value("a", BIG // 2 + 1),
        set_value("a", BIG - 1),
        set_value("b", 0, 0),
        set_value("b", 1, BIG - 600),
        set_value("b", 2, BIG - 1),
        lambda tensors: tensors.update(b=tensors["b"].view(BIG, 3)),
        lambda tensors: tensors.update(c=tensors.pop("a")),
        lambda tensors: tensors.update(b=torch.full((3, BIG), 1e-3)),
    ],
)
def test_other_weights_are_another_model(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object]
) -> None:
    before = weights_identity(write(tmp_path))
    assert changed(tmp_path, change) != before


def test_another_config_is_another_model(tmp_path: Path) -> None:
    before = weights_identity(write(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type":  "llama"}')
    assert weights_identity(tmp_path) != before


def test_every_shard_counts(tmp_path: Path) -> None:
    write(tmp_path)
    save_file({"c": torch.zeros(2)}, tmp_path / "two.safetensors")
    (tmp_path / SINGLE).rename(tmp_path / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    before = weights_identity(tmp_path)
    save_file({"c": torch.ones(2)}, tmp_path / "two.safetensors")
    assert weights_identity(tmp_path) != before


def test_the_names_of_shards_do_not_count(tmp_path: Path) -> None:
    before = weights_identity(write(tmp_path))
    (tmp_path / SINGLE).rename(tmp_path / "one.safetensors")
    (tmp_path / INDEX).write_text(
        json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}})
    )
    assert weights_identity(tmp_path) == before


def test_the_size_of_a_file_counts(tmp_path: Path) -> None:
    before = weights_identity(write(tmp_path))
    with (tmp_path / SINGLE).open("ab") as file:
        file.write(b"more")
    assert weights_identity(tmp_path) != before


def test_little_is_read_of_a_large_tensor(tmp_path: Path) -> None:
    """A value between two samples isn't seen: this is told in the module's docstring, and is what makes it cheap."""
    write(tmp_path, big=torch.zeros(100 * SAMPLE))
    before = weights_identity(tmp_path)
    assert changed(tmp_path, set_value("big", SAMPLE + 100)) == before
    assert changed(tmp_path, set_value("big", -1)) != before


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"[]", b"\x04" + b"\0" * 7 + b'{"a"']
)
def test_what_is_no_safetensors_file_is_named(tmp_path: Path, data: bytes) -> None:
    write(tmp_path)
    (tmp_path / SINGLE).write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=SINGLE):
        weights_identity(tmp_path)
