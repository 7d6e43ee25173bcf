"""Checkpoints on disk: shards, an index that must agree, and files that are not what they should be."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from manylora.quant.checkpoint import Checkpoint
from manylora.quant.errors import CorruptCheckpoint
from manylora.quant.weight_files import INDEX, NAMED, SINGLE

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_shards(directory: Path, **weight_map: str) -> None:
    save_file({"a": torch.ones(2, 3)}, directory / ONE)
    save_file({"b": torch.zeros(4, dtype=torch.bfloat16)}, directory / TWO)
    (directory / INDEX).write_text(json.dumps({"weight_map": {"a": ONE, "b": TWO, **weight_map}}))


def test_one_file(tmp_path: Path) -> None:
    save_file({"a": torch.arange(6.0).view(2, 3)}, tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.names() == {"a"}
    assert checkpoint.shape("a") == (2, 3)
    assert checkpoint.notes == ()
    assert torch.equal(checkpoint.read("a"), torch.arange(6.0).view(2, 3))


def test_shards(tmp_path: Path) -> None:
    write_shards(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.names() == {"a", "b"}
    assert checkpoint.read("b").dtype == torch.bfloat16
    assert checkpoint.locate("b") == tmp_path / TWO
    assert checkpoint.locate("c") == tmp_path


def test_a_tensor_does_not_change_with_its_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1000)}, tmp_path / SINGLE)
    tensor = Checkpoint(tmp_path).read("a")
    with (tmp_path / SINGLE).open("r+b") as file:
        file.seek(-4000, 2)
        file.write(b"\0" * 4000)
    assert torch.equal(tensor, torch.ones(1000))


def refusal(directory: Path) -> str:
    with pytest.raises(CorruptCheckpoint) as refused:
        Checkpoint(directory)
    return str(refused.value)


def test_an_index_that_names_a_missing_shard(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / TWO).unlink()
    assert f"{tmp_path / TWO} is missing" in refusal(tmp_path)


def test_an_index_that_names_a_missing_tensor(tmp_path: Path) -> None:
    write_shards(tmp_path, c=TWO)
    assert "names 'c', which no shard has" in refusal(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    write_shards(tmp_path)
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, tmp_path / TWO)
    message = refusal(tmp_path)
    assert "'a'" in message
    assert ONE in message
    assert TWO in message


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_may_name_only_files_beside_it(tmp_path: Path, shard: str) -> None:
    write_shards(tmp_path, a=shard)
    assert repr(shard) in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    assert "is not a safetensors index" in refusal(tmp_path)


def test_one_file_beside_an_older_index_is_the_model(tmp_path: Path) -> None:
    """As transformers' save_pretrained leaves it: the shards are gone or not, the index stays."""
    write_shards(tmp_path)
    save_file({"a": torch.full((2, 3), 7.0), "new": torch.ones(1)}, tmp_path / SINGLE)
    for shard in (ONE, TWO):
        checkpoint = Checkpoint(tmp_path)
        assert checkpoint.names() == {"a", "new"}
        assert torch.equal(checkpoint.read("a"), torch.full((2, 3), 7.0))
        assert checkpoint.shards == (tmp_path / SINGLE,)
        assert checkpoint.notes == (
            f"{tmp_path / INDEX} is not read: {SINGLE} is beside it and goes before it, as in transformers",
        )
        (tmp_path / shard).unlink()


def test_where_one_answer_is_there_nothing_is_noted(tmp_path: Path) -> None:
    write_shards(tmp_path)
    assert Checkpoint(tmp_path).notes == ()
    assert Checkpoint(tmp_path).shards == (tmp_path / ONE, tmp_path / TWO)


def test_the_config_may_name_the_file(tmp_path: Path) -> None:
    write_shards(tmp_path)
    save_file({"own": torch.ones(1)}, tmp_path / "own.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({NAMED: "own.safetensors"}))
    assert Checkpoint(tmp_path).names() == {"own"}
    (note,) = Checkpoint(tmp_path).notes
    assert note == f"{tmp_path / INDEX} is not read: config.json names own.safetensors ({NAMED})"
    save_file({"single": torch.ones(1)}, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text(json.dumps({NAMED: INDEX}))
    assert Checkpoint(tmp_path).names() == {"a", "b"}
    (note,) = Checkpoint(tmp_path).notes
    assert note == f"{tmp_path / SINGLE} is not read: config.json names {INDEX} ({NAMED})"


@pytest.mark.parametrize("named", ["../own.safetensors", "own.bin", 3, "gone.safetensors"])
def test_a_file_that_the_config_may_not_name(tmp_path: Path, named: object) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / SINGLE)
    (tmp_path / "config.json").write_text(json.dumps({NAMED: named}))
    assert str(named) in refusal(tmp_path)


def test_a_git_lfs_pointer_is_called_one(tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    )
    assert f"{tmp_path / SINGLE} is a Git LFS pointer" in refusal(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 100, 1000])
def test_a_truncated_file(tmp_path: Path, kept: int) -> None:
    save_file({"a": torch.ones(1000)}, tmp_path / SINGLE)
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:kept])
    assert f"{tmp_path / SINGLE} is not a whole safetensors file" in refusal(tmp_path)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4976698672\n"


def test_a_pointer_in_place_of_weights_or_index_is_told_as_one(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(LFS)
    assert f"{tmp_path / INDEX} is a Git LFS pointer" in refusal(tmp_path)
    (tmp_path / SINGLE).write_text(LFS)
    assert f"{tmp_path / SINGLE} is a Git LFS pointer" in refusal(tmp_path)


def test_weights_that_may_not_be_read_are_not_called_broken(tmp_path: Path) -> None:
    (tmp_path / SINGLE).symlink_to(tmp_path / SINGLE)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": ONE}}))
    (tmp_path / ONE).mkdir()
    assert "is missing" in refusal(tmp_path)  # a directory is no file
    (tmp_path / "config.json").write_text("[" * 100_000)  # whoever reads it says so
    assert "is missing" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pth"])
def test_pickle_is_refused_with_what_to_do(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    message = refusal(tmp_path)
    assert name in message
    assert "convert it with transformers' save_pretrained" in message


def test_a_file_of_another_name(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "gptq_model-4bit-128g.safetensors")
    message = refusal(tmp_path)
    assert "gptq_model-4bit-128g.safetensors" in message
    assert "rename" in message


def test_an_empty_directory(tmp_path: Path) -> None:
    assert f"neither {SINGLE} nor {INDEX}" in refusal(tmp_path)


def test_a_missing_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path)
    for ask in (checkpoint.read, checkpoint.shape):
        with pytest.raises(CorruptCheckpoint, match="'b' is missing"):
            ask("b")
