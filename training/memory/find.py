"""The sizes of a base by its name: a directory, a config.json, or a hub's model, of which only config.json is had."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from manylora.training.errors import BaseRefused, reason_of
from manylora.training.memory.shape import ModelShape

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where old GPTQ and AWQ checkpoints say how they are stored."""


def read_shape(name: str, revision: str | None = None, cache_dir: str | None = None) -> ModelShape:
    """Return a base's sizes. Raises BaseRefused when there is no such base or its config.json can't be planned for."""
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        _check_directory(path)
        path = path / CONFIG
    if not path.is_file():
        path = _from_hub(name, revision, cache_dir)
    config = _read(path)
    for beside, method in _BESIDE.items():
        if config.get("quantization_config") is None and (path.parent / beside).is_file():
            section = {"quant_method": method, **_read(path.parent / beside)}
            config = {**config, "quantization_config": section}
    return ModelShape.from_config(config)


def _check_directory(path: Path) -> None:
    """Say what a directory without a config.json is, where it is there: "there is no such directory" is not true."""
    if (path / CONFIG).is_file():
        return
    if (path / ADAPTER_CONFIG).is_file():
        raise BaseRefused(f"{path} is an adapter; name the base that it belongs to.")
    raise BaseRefused(f"there is no {CONFIG} in {path}: a model's directory has one.")


def _read(path: Path) -> Mapping[str, object]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BaseRefused(f"{path} can't be read: {reason_of(error)}.") from None
    if not isinstance(config, dict):
        raise BaseRefused(f"{path} holds no JSON object; a model's config.json is one.")
    return config


def _from_hub(name: str, revision: str | None, cache_dir: str | None) -> Path:
    expected = "expected a model's directory, its config.json, or OWNER/MODEL of the hub"
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(".json"):
        raise BaseRefused(f"there is no {name!r}: {expected}.")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # one line says it, not one for each of its retries
    try:
        return Path(hf_hub_download(name, CONFIG, revision=revision, cache_dir=cache_dir))
    except LocalEntryNotFoundError:
        raise BaseRefused(f"{name} is no directory here, and the hub can't be reached: {expected}.") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BaseRefused(f"{name} can't be had from the hub ({reason}): {expected}.") from None
