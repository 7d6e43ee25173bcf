"""Where a base's files are, what they say it is, and what can't be trained on, said in one line."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from manylora.quant.checkpoint import Checkpoint
from manylora.quant.config import stored_format
from manylora.quant.errors import QuantError
from manylora.quant.format import StoredFormat
from manylora.quant.hub import find_checkpoint
from manylora.training.errors import BaseRefused, reason_of

FIRST_QWEN = "qwen"
"""model_type of the first Qwen, whose model is Python code in its repository."""


def find_base(name: str, *, revision: str | None, cache_dir: str | None, with_code: bool) -> Path:
    """Return the base's directory, downloaded if ``name`` is the hub's. Raises BaseRefused."""
    try:
        return find_checkpoint(name, revision=revision, cache_dir=cache_dir, with_code=with_code)
    except QuantError as error:
        raise BaseRefused(str(error)) from None


def read_config(name: str, directory: Path, *, trust_remote_code: bool) -> Mapping[str, object]:
    """Return config.json. Raises BaseRefused for one that isn't there, or a model that is code from its repository."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = (
            "is missing" if isinstance(error, FileNotFoundError) else f"can't be read: {reason_of(error)}"
        )
        raise BaseRefused(
            f"{path} {reason}; a base is a directory with config.json and safetensors"
        ) from None
    if not isinstance(config, dict):
        raise BaseRefused(f"{path} is not an object")
    if not trust_remote_code:
        _refuse_code(name, config)
    return config


def _refuse_code(name: str, config: Mapping[str, object]) -> None:
    if config.get("model_type") == FIRST_QWEN:
        raise BaseRefused(
            f"{name} is the first Qwen (model_type 'qwen'), whose model is Python code in its repository: take its "
            "successor Qwen2.5 (Qwen/Qwen2.5-7B-Instruct), or give --trust_remote_code to run that code"
        )
    from transformers import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        what = "needs Python code from its repository" if config.get("auto_map") else "isn't known here"
        how = " or give --trust_remote_code to run that code" if config.get("auto_map") else ""
        raise BaseRefused(
            f"{name} has model_type {config.get('model_type')!r}, which {what}: take a base of another family{how}"
        )


def read_format(directory: Path, config: Mapping[str, object]) -> tuple[Checkpoint, StoredFormat]:
    """Return the checkpoint and how its linear layers are stored. Raises BaseRefused, for pickled weights too."""
    try:
        return Checkpoint(directory), stored_format(directory, config)
    except QuantError as error:
        raise BaseRefused(str(error)) from None


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return the sha256, 64 hex digits, over config.json and every file of weights, in their names' order."""
    whole = hashlib.sha256()
    for path in (checkpoint.directory / "config.json", *checkpoint.shards):
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()
