"""Which files of a directory are the model's weights: the same ones that transformers would read. Opens no weights.

A directory may hold more than one answer: transformers' ``save_pretrained`` writes ``model.safetensors`` into a
directory with an older model's index and leaves the index there. Every reader (serving, training, merging) asks here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from manylora.quant.errors import CorruptCheckpoint

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NAMED = "transformers_weights"
"""The key of config.json that names the file (transformers 5); it goes before the usual names."""

_LFS = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """What holds a model's weights."""

    shards: tuple[str, ...]
    """Names of the files beside config.json, in order."""
    index: Path | None
    promised: Mapping[str, str]
    """Tensor to shard, as the index says; empty without one."""
    notes: tuple[str, ...] = ()
    """Sentences about what was passed over."""


def choose_weights(directory: Path) -> WeightFiles:
    """Return the files that hold the weights of the model in ``directory``.

    What config.json names, else model.safetensors, else what the index names: the order of transformers 5.24
    (modeling_utils._get_resolved_checkpoint_files). Raises CorruptCheckpoint.
    """
    named = _named_by_config(directory)
    if named is not None:
        return _by_name(directory, named)
    index = directory / INDEX
    if (directory / SINGLE).is_file():
        note = f"{index} is not read: {SINGLE} is beside it and goes before it, as in transformers"
        return WeightFiles((SINGLE,), None, {}, (note,) if index.is_file() else ())
    if index.is_file():
        return _by_index(index)
    raise CorruptCheckpoint(_why_not(directory))


def _named_by_config(directory: Path) -> str | None:
    try:
        config: object = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # whoever reads the config says what is wrong with it
    named = config.get(NAMED) if isinstance(config, dict) else None
    if named is not None and (not isinstance(named, str) or Path(named).name != named):
        raise CorruptCheckpoint(
            f"{directory / 'config.json'}: {NAMED} {named!r} is not the name of a file beside it"
        )
    return named


def _by_name(directory: Path, named: str) -> WeightFiles:
    if named.endswith(".safetensors.index.json"):
        found = _by_index(directory / named)
    elif named.endswith(".safetensors"):
        found = WeightFiles((named,), None, {})
    else:
        raise CorruptCheckpoint(
            f"{directory / 'config.json'}: {NAMED} {named!r} is neither a .safetensors file nor an index of some"
        )
    others = [name for name in (SINGLE, INDEX) if name != named and (directory / name).is_file()]
    notes = tuple(f"{directory / name} is not read: config.json names {named} ({NAMED})" for name in others)
    return WeightFiles(found.shards, found.index, found.promised, notes)


def _by_index(index: Path) -> WeightFiles:
    promised = _read_index(index)
    return WeightFiles(tuple(sorted(set(promised.values()))), index, promised)


def _read_index(index: Path) -> Mapping[str, str]:
    try:
        weight_map: object = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except OSError as error:
        raise CorruptCheckpoint(f"{index} can't be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpoint(
            f"{index} is {pointer(index) or f'not a safetensors index: {error}'}"
        ) from None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CorruptCheckpoint(f"{index} is not a safetensors index: weight_map is not names to files")
    outside = next((shard for shard in weight_map.values() if Path(shard).name != shard), None)
    if outside is not None:
        raise CorruptCheckpoint(f"{index} names {outside!r}, which is not a file beside it")
    return weight_map


def pointer(path: Path) -> str | None:
    """Say so if a file is what Git leaves in place of a large one (git-lfs.com, pointer files, version 1)."""
    with path.open("rb") as file:
        is_pointer = file.read(len(_LFS)) == _LFS
    if not is_pointer:
        return None
    return "a Git LFS pointer, not the file that it stands for; run `git lfs pull` in its repository"


def _why_not(directory: Path) -> str:
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if others:
        return f"{directory} has {others[0]} but neither {SINGLE} nor {INDEX}: rename it if it is the whole model"
    pickles = sorted(path.name for end in ("*.bin", "*.pt", "*.pth") for path in directory.glob(end))
    if pickles:
        return (
            f"{directory} has {pickles[0]} but no safetensors: pickle can run code and is not opened; "
            "convert it with transformers' save_pretrained"
        )
    return f"{directory} has neither {SINGLE} nor {INDEX}"
