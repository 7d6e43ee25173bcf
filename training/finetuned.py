"""A trained model ready to answer, from its directory alone: base, adapter and tokenizer, as they were trained."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from manylora.adapters.files import BASE_FILE
from manylora.adapters.tokenizer import has_tokenizer
from manylora.quant.errors import QuantError
from manylora.quant.hub import find_checkpoint
from manylora.training.bases.load import BaseSettings, load_base, load_tokenizer
from manylora.training.bases.precision import DTYPES
from manylora.training.bases.quantized import forbid_merging
from manylora.training.bases.quiet import quiet_peft
from manylora.training.bases.save import CONFIG_FILE
from manylora.training.bases.tokens import grow_embedding
from manylora.training.bases.types import DtypeName
from manylora.training.errors import BaseRefused, reason_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_finetuned_model(
    path: str | Path,
    load_in_4bit: bool | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    base: str | None = None,
) -> "tuple[PeftModel | PreTrainedModel, PreTrainedTokenizerBase]":
    """Return (model, tokenizer), the model in eval mode.

    ``path`` is a trained adapter's directory, or a merged model's, or OWNER/NAME of either on the hub. The base is the
    one that the adapter names, and held as it was in training: in NF4 if the adapter was trained with --q_lora, in GPTQ
    or AWQ if it is stored so. ``load_in_4bit`` True or False overrides that for a 16-bit base, ``dtype`` (bfloat16,
    float16 or float32) and ``device`` what else would be chosen, and ``base`` where the base is. No code from a
    checkpoint is ever run. Raises BaseRefused with what is wrong.
    """
    try:
        directory = find_checkpoint(str(path))
    except QuantError as error:
        raise BaseRefused(str(error)) from None
    settings = replace(
        _settings(directory, base),
        device=None if device is None else torch.device(device),
    )
    if load_in_4bit is not None:
        settings = replace(settings, q_lora=load_in_4bit)
    if dtype is not None:
        settings = replace(settings, dtype=_name_of(dtype))
    loaded = load_base(settings)
    loaded.model.config.use_cache = True
    tokenizer = loaded.tokenizer
    if not (directory / CONFIG_FILE).is_file():
        return loaded.model.eval(), tokenizer
    if has_tokenizer(directory):
        tokenizer = load_tokenizer(directory, settings)
    return _with_adapter(loaded.model, len(tokenizer), directory), tokenizer


def _settings(directory: Path, base: str | None) -> BaseSettings:
    """Return how the base is to be loaded: as it was in training, where that is written down."""
    config_path = directory / CONFIG_FILE
    if not config_path.is_file():
        return BaseSettings(str(directory), dtype=_stored_dtype(directory))
    config = _read_json(config_path)
    name = base or config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise BaseRefused(f"{config_path} doesn't name its base (base_model_name_or_path); give base=…")
    revision = config.get("revision")
    settings = BaseSettings(name, revision=revision if isinstance(revision, str) else None)
    path = directory / BASE_FILE
    if not path.is_file():
        return settings
    held = _read_json(path)
    dtype = held.get("dtype")
    if dtype not in DTYPES:
        raise BaseRefused(f"{path}: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return replace(
        settings,
        name=_where_it_is_now(name, held, directory) if base is None else name,
        q_lora=held.get("kind") == "nf4",
        double_quant=bool(held.get("double_quant")),
        dtype=dtype,
    )


def _where_it_is_now(name: str, held: Mapping[str, object], adapter: Path) -> str:
    """Return the base's name, or where it is seen from the adapter if the name was relative to another working
    directory."""
    way = held.get("directory")
    if Path(os.path.expanduser(name)).is_dir() or not isinstance(way, str):
        return name
    found = Path(os.path.normpath(adapter.resolve() / way))
    return str(found) if found.is_dir() else name


def _with_adapter(model: "PreTrainedModel", tokens: int, directory: Path) -> "PeftModel":
    from peft import PeftModel

    config = _read_json(directory / CONFIG_FILE)
    brings_tokens = config.get("modules_to_save") or config.get("trainable_token_indices")
    if brings_tokens:
        grow_embedding(model, tokens)
    try:
        with quiet_peft():
            adapted = PeftModel.from_pretrained(model, str(directory))
    except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BaseRefused(f"{directory} is no adapter for {model.name_or_path}: {first}") from error
    forbid_merging(adapted)
    return adapted.eval()


def _stored_dtype(directory: Path) -> DtypeName:
    """Return the type of a merged model's own config.json; bf16 if it names none."""
    path = directory / "config.json"
    config = _read_json(path) if path.is_file() else {}
    named = str(config.get("dtype") or config.get("torch_dtype"))
    return next((name for name, dtype in DTYPES.items() if str(dtype) == f"torch.{named}"), "bf16")


def _name_of(dtype: torch.dtype) -> DtypeName:
    for name, each in DTYPES.items():
        if each == dtype:
            return name
    raise BaseRefused(f"dtype {dtype} is not one of {', '.join(map(str, DTYPES.values()))}")


def _read_json(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BaseRefused(f"{path} can't be read: {reason_of(error)}") from None
    if not isinstance(value, dict):
        raise BaseRefused(f"{path} is not an object")
    return value
