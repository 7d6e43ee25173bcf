"""A base to train on: how it is asked for, and what it is once loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from manylora.adapters.base_form import BaseForm
from manylora.quant.nf4 import DOUBLE_QUANT

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DtypeName = Literal["bf16", "fp16", "fp32"]
Kind = Literal["dense", "nf4", "gptq", "awq"]


@dataclass(frozen=True, slots=True)
class BaseSettings:
    """Which base, and how it is held."""

    name: str
    """A directory, or OWNER/MODEL on the hub."""
    q_lora: bool = False
    """Hold a 16-bit checkpoint in NF4. What is stored in 4 or 8 bits stays as it is, with or without."""
    dtype: DtypeName = "bf16"
    """Of what isn't quantised, and of the products."""
    trust_remote_code: bool = False
    revision: str | None = None
    cache_dir: str | None = None
    double_quant: bool = DOUBLE_QUANT
    """NF4: quantise the scales too. A server does the same unless it is told otherwise."""
    model_max_length: int | None = None
    """Tokens after which the tokenizer's own limit says that a text is too long."""
    device: torch.device | None = None
    """None: the CUDA device of this process, or the CPU where there is none."""
    fsdp: bool = False
    """Whether FSDP will shard the model. DeepSpeed's ZeRO-3 tells by itself."""


@dataclass(frozen=True, slots=True)
class Base:
    """A base in memory, every weight frozen."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    name: str
    """As it was asked for: what adapters call their base."""
    directory: Path
    kind: Kind
    dtype: torch.dtype
    """Of what isn't quantised, and of the products."""
    fingerprint: str
    """sha256 over config.json and the files of weights."""
    notes: tuple[str, ...]
    """Sentences for the user: what was decided, and why."""
    double_quant: bool = False
    """NF4: whether the scales are quantised too."""
    from_16bit: bool = False
    """NF4: whether the files hold 16-bit weights, which were quantised while loading."""
    revision: str | None = None
    served_as_it_is: bool = False
    """Whether config.json says that it is served unquantised, as a merged model's does."""

    @property
    def form(self) -> BaseForm:
        """How its linear layers are held."""
        return BaseForm(self.kind, self.double_quant)

    @property
    def serve_flags(self) -> tuple[str, ...]:
        """The flags of ``manylora serve`` that hold it as it is held here."""
        if self.kind != "dense" and not self.from_16bit:
            return ()  # stored so
        flags = self.form.serve_flags()
        return ("--quantization", "nf4", *flags) if self.from_16bit and self.served_as_it_is else flags
