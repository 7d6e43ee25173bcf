"""Whether the server will take the adapter, said before training and not after. adapters/spec.py decides it then."""

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from manylora.training.bases.settings import LoraSettings
from manylora.training.bases.types import Base

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

SERVED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""model_type of the families that server/model has."""
SERVER_RANK = 256
"""The server's --max-rank, unless it is told otherwise."""
_TOKEN_MODULES = ("embed_tokens", "lm_head")


@dataclass(frozen=True, slots=True)
class Servable:
    """An answer with its reason, which may hold advice: a flag the server needs, or what else can be done."""

    yes: bool
    because: str

    def sentence(self) -> str:
        """Return the line that a run prints."""
        return f"servable as an adapter: {'yes' if self.yes else 'no'}, because {self.because}"


def servable(base: Base, lora: LoraSettings) -> Servable:
    """Say whether the server takes such an adapter on such a base."""
    reason = next(_obstacles(base, lora), None)
    if reason is not None:
        return Servable(False, f"{reason}; transformers and peft load it (load_finetuned_model)")
    return Servable(True, "; ".join((_kind(lora), *_advice(base, lora))))


def serve_command(base: Base, adapters: "Mapping[str, Path]", rank: int) -> str:
    """Return the command that serves ``adapters``, of at most ``rank``, on the base as it was trained and evaluated."""
    words = ["manylora", "serve", base.name, *base.serve_flags]
    if rank > SERVER_RANK:
        words += ["--max-rank", str(rank)]
    for name, directory in adapters.items():
        words += ["--adapter", f"{name}={directory.resolve()}"]
    return shlex.join(words)


def _kind(lora: LoraSettings) -> str:
    tokens = [name for name in lora.targets if name.rpartition(".")[2] in _TOKEN_MODULES]
    parts = ["LoRA on linear layers of the blocks" if not tokens else "LoRA on layers, embedding and head"]
    if lora.modules_to_save:
        parts.append(f"whole modules ({', '.join(lora.modules_to_save)})")
    if lora.new_tokens:
        parts.append(f"tokens of its own ({', '.join(lora.new_tokens)})")
    return f"it is {'plain ' if len(parts) == 1 and not tokens else ''}{', '.join(parts)}"


def _obstacles(base: Base, lora: LoraSettings) -> "Iterator[str]":
    family = base.model.config.model_type
    if family not in SERVED_FAMILIES:
        yield f"the server has no family {family!r} (it has {', '.join(SERVED_FAMILIES)})"
    others = [name for name in lora.modules_to_save if name.rpartition(".")[2] not in _TOKEN_MODULES]
    if others:
        yield f"it brings whole modules ({', '.join(others)}) that are neither embedding nor head"


def _advice(base: Base, lora: LoraSettings) -> "Iterator[str]":
    rank = lora.saved_rank
    if lora.invocation:
        yield f"it acts from the last place of its invocation in a prompt on, {list(lora.invocation)}"
    if lora.starts_from_base:
        yield f"its start is saved with it, which makes it rank up to {rank} on the unchanged base"
    if rank > SERVER_RANK:
        yield f"its rank {rank} needs `manylora serve --max-rank {rank}`"
    if base.serve_flags:
        yield f"serve its base with {' '.join(base.serve_flags)}, as it is trained"
