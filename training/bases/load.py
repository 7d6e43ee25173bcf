"""Loading a base to train on: 16-bit, NF4 by bitsandbytes, GPTQ and AWQ by our own quant/. Every weight is frozen.

Embeddings, head and norms stay in the base's type: at a vocabulary of 150,000 in float32 they would weigh as much as
half a 4-bit 7B. Families compute their norms in float32 whatever the weight's type.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from manylora.quant.checkpoint import Checkpoint
from manylora.quant.errors import QuantError
from manylora.quant.format import StoredFormat
from manylora.quant.served_form import ServedForm, served_form
from manylora.training.bases import tokenizer as tokenizers
from manylora.training.bases.find import find_base, fingerprint, read_config, read_format
from manylora.training.bases.packed import load_packed
from manylora.training.bases.precision import choose_device, choose_dtype
from manylora.training.bases.quiet import quiet_bitsandbytes
from manylora.training.bases.types import Base, BaseSettings, DtypeName, Kind
from manylora.training.errors import BaseRefused

__all__ = ["Base", "BaseSettings", "DtypeName", "Kind", "load_base"]


def load_base(settings: BaseSettings) -> Base:
    """Load a base with its tokenizer.

    Raises BaseRefused: it isn't there, is broken, or can't be trained on.
    """
    quiet_bitsandbytes()
    directory = find_base(
        settings.name,
        revision=settings.revision,
        cache_dir=settings.cache_dir,
        with_code=settings.trust_remote_code,
    )
    config = read_config(settings.name, directory, trust_remote_code=settings.trust_remote_code)
    checkpoint, stored = read_format(directory, config)
    device = choose_device(settings.device)
    dtype, notes = choose_dtype(settings.dtype, device)
    kind: Kind = "nf4" if stored.kind == "dense" and settings.q_lora else stored.kind
    own = _own_form(settings.name, config)
    _refuse_sharding(kind, settings)
    tokenizer = load_tokenizer(directory, settings)
    model = _load_model(checkpoint, stored, kind, replace(settings, device=device), dtype)
    model.requires_grad_(False)
    model.config.use_cache = False
    return Base(
        model=model,
        tokenizer=tokenizer,
        name=settings.name,
        directory=directory,
        kind=kind,
        dtype=dtype,
        fingerprint=fingerprint(checkpoint),
        notes=notes + checkpoint.notes + _notes(stored, kind, settings) + _lost(own, kind, dtype),
        double_quant=kind == "nf4" and (settings if stored.kind == "dense" else stored).double_quant,
        from_16bit=kind == "nf4" and stored.kind == "dense",
        revision=settings.revision,
        served_as_it_is=own is not None,
    )


def _own_form(name: str, config: Mapping[str, Any]) -> ServedForm | None:
    try:
        return served_form(config)
    except QuantError as error:
        raise BaseRefused(f"{name}: {error}") from None


def _lost(own: ServedForm | None, kind: Kind, dtype: torch.dtype) -> tuple[str, ...]:
    """Return what is lost of a merged model that is held otherwise than it says."""
    return () if own is None else own.costs(dtype, quantised="nf4" if kind == "nf4" else None)


def load_tokenizer(directory: Path, settings: BaseSettings) -> Any:
    """Return the base's tokenizer. Raises BaseRefused."""
    return tokenizers.load_tokenizer(
        directory,
        model_max_length=settings.model_max_length,
        trust_remote_code=settings.trust_remote_code,
    )


def _load_model(
    checkpoint: Checkpoint, stored: StoredFormat, kind: Kind, settings: BaseSettings, dtype: torch.dtype
) -> Any:
    try:
        if kind in ("gptq", "awq"):
            assert settings.device is not None
            return load_packed(checkpoint, stored, dtype, settings.device, settings.trust_remote_code)
        return _by_transformers(checkpoint.directory, stored, kind, settings, dtype)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise BaseRefused(f"{settings.name} can't be loaded: {_first_line(error)}") from error


def _by_transformers(
    directory: Path, stored: StoredFormat, kind: Kind, settings: BaseSettings, dtype: torch.dtype
) -> Any:
    from transformers import AutoModelForCausalLM

    options: dict[str, object] = {}
    if kind == "nf4" and stored.kind == "dense":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=settings.double_quant,
            bnb_4bit_compute_dtype=dtype,
            # FSDP shards tensors of one type only, and takes the codes for floats that nobody computes with.
            bnb_4bit_quant_storage=dtype if settings.fsdp else torch.uint8,
        )
    if not _is_sharded(settings):
        options["device_map"] = {"": settings.device}
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        # Before NF4 codes are made, the weight is cast to this type: so does the server.
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=settings.trust_remote_code,
        **options,
    )
    if kind == "nf4":
        from manylora.training.bases.nf4 import settle_nf4

        settle_nf4(model, dtype)
    return model


def _is_sharded(settings: BaseSettings) -> bool:
    """Whether FSDP or ZeRO-3 puts the parameters on devices, and not we."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    return settings.fsdp or bool(is_deepspeed_zero3_enabled())


def _refuse_sharding(kind: Kind, settings: BaseSettings) -> None:
    if kind in ("gptq", "awq") and _is_sharded(settings):
        raise BaseRefused(
            f"{settings.name} is stored in {kind.upper()}, whose packed words FSDP and ZeRO-3 can't shard: "
            "use plain DDP or ZeRO-2, or a 16-bit base with --q_lora"
        )


def _notes(stored: StoredFormat, kind: Kind, settings: BaseSettings) -> tuple[str, ...]:
    names = {"nf4": "NF4", "gptq": f"GPTQ Int{stored.bits}", "awq": "AWQ"}
    if kind == "dense":
        return ()
    if stored.kind == "dense":
        how = " with double quantisation" if settings.double_quant else ""
        return (f"the 16-bit weights are held in NF4{how} (--q_lora)",)
    if settings.q_lora:
        return (f"the base is stored in {names[kind]} and stays in it",)
    return (f"the base is stored in {names[kind]}: this is Q-LoRA without --q_lora too",)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
