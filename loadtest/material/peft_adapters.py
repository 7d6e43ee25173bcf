"""Random adapters of every kind that is served, as peft itself writes them, and how each is read back for reference.

Each has weights of its own everywhere. Plain ones, in any number and without peft, are checkpoints.py's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor

from manylora.adapters.tokenizer import load_tokenizer
from manylora.loadtest.material.checkpoints import ALL_LINEAR, write_tokenizer
from manylora.loadtest.material.quiet import advice_off

NEW_TOKENS = ("<|think|>", "<|done|>", "<|tool|>")


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """One adapter; ``fields`` go into its LoraConfig."""

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    size: int | None = None
    """Rows that embedding and head are resized to first; None: as many as the base's."""

    @property
    def invocation(self) -> tuple[int, ...]:
        """Ids that activate it; (): it always acts."""
        return tuple(self.fields.get("alora_invocation_tokens", ()))

    def own_ids(self, vocab_size: int) -> tuple[int, ...]:
        """Return the ids that mean something to it alone: those that activate it, that it trained, that it adds."""
        trained = self.fields.get("trainable_token_indices", ())
        rows = chain(*trained.values()) if isinstance(trained, Mapping) else trained
        added = range(vocab_size, self.size or vocab_size)
        return (*self.invocation, *sorted({*rows, *added}))


def linear_kinds() -> list[PeftAdapter]:
    """Return adapters of linear layers: ranks of 1 to 64, each way to choose modules and scales, lengths and biases."""
    return [*_lora_kinds(), *_dora_kinds(), *_bias_kinds()]


def _lora_kinds() -> list[PeftAdapter]:
    every: dict[str, object] = {"target_modules": "all-linear"}
    return [
        PeftAdapter("LoRA of two modules", {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8}),
        PeftAdapter("LoRA of all linear", {**every, "r": 64, "lora_alpha": 32}),
        PeftAdapter(
            "rank and alpha patterns",
            {
                "target_modules": r".*\.(q_proj|o_proj|down_proj|up_proj)",
                "r": 12,
                "lora_alpha": 15,
                "rank_pattern": {"o_proj": 48, r"layers\.1\.mlp\.down_proj": 1},
                "alpha_pattern": {"o_proj": 30, r"layers\.1\.mlp\.down_proj": 4},
            },
        ),
        PeftAdapter(
            "rsLoRA of one layer",
            {
                "target_modules": list(ALL_LINEAR),
                "r": 32,
                "lora_alpha": 5,
                "use_rslora": True,
                "layers_to_transform": [1],
            },
        ),
        PeftAdapter(
            "all but some modules",
            {**every, "r": 7, "lora_alpha": 12, "exclude_modules": ["k_proj", "gate_proj"]},
        ),
    ]


def _dora_kinds() -> list[PeftAdapter]:
    return [
        PeftAdapter("DoRA", {"target_modules": "all-linear", "r": 16, "lora_alpha": 16, "use_dora": True}),
        PeftAdapter(
            "DoRA with patterns and biases",
            {
                "target_modules": ["q_proj", "v_proj", "gate_proj"],
                "r": 8,
                "lora_alpha": 4,
                "use_dora": True,
                "use_rslora": True,
                "rank_pattern": {"v_proj": 24},
                "bias": "lora_only",
            },
        ),
    ]


def _bias_kinds() -> list[PeftAdapter]:
    return [
        PeftAdapter("trained biases", {"target_modules": ["o_proj", "up_proj"], "bias": "all"}),
        PeftAdapter("biases of B", {"target_modules": ["k_proj", "down_proj"], "r": 24, "lora_bias": True}),
    ]


def activated_kinds(invocations: Sequence[Sequence[int]]) -> list[PeftAdapter]:
    """Return an activated adapter (aLoRA) for each of these sequences of ids."""
    targets: Sequence[object] = ("all-linear", ["q_proj", "v_proj"], ["k_proj", "gate_proj", "down_proj"])
    return [
        PeftAdapter(
            f"aLoRA {number}",
            {
                "target_modules": targets[number % len(targets)],
                "r": 4 << number % 5,
                "lora_alpha": 6,
                "use_rslora": number % 2 == 1,
                "alora_invocation_tokens": list(ids),
            },
        )
        for number, ids in enumerate(invocations)
    ]


def token_kinds(vocab_size: int) -> list[PeftAdapter]:
    """Return one adapter of each kind that changes embedding or head, for a base of so many ids."""
    more, both = vocab_size + len(NEW_TOKENS), ["embed_tokens", "lm_head"]
    new = list(range(vocab_size, more))
    rows = {"embed_tokens": [*new, 5], "lm_head": [*new, 5]}
    return [
        PeftAdapter("whole embedding", {"modules_to_save": ["embed_tokens"]}),
        PeftAdapter("whole head", {"modules_to_save": ["lm_head"]}),
        PeftAdapter("both whole", {"modules_to_save": both}),
        PeftAdapter("factors of both", {"target_modules": ["q_proj", *both]}),
        PeftAdapter("factors of the head alone", {"target_modules": ["lm_head"], "use_rslora": True}),
        PeftAdapter("trained tokens", {"trainable_token_indices": [3, 70, 7, 200]}),
        PeftAdapter(
            "trained tokens of both", {"trainable_token_indices": {"embed_tokens": [9], "lm_head": [4, 9]}}
        ),
        PeftAdapter("added tokens, whole", {"modules_to_save": both}, more),
        PeftAdapter("added tokens, rows", {"trainable_token_indices": rows}, more),
        PeftAdapter("added tokens, factors too", {"target_modules": ["v_proj", *both]}, more),
        PeftAdapter("fewer tokens", {"modules_to_save": both}, vocab_size - 2),
    ]


def tied_kinds() -> list[PeftAdapter]:
    """Return adapters whose head stays the embedding, which a base without its own head has."""
    return [
        PeftAdapter("whole, tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        PeftAdapter(
            "factors, tied", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
        ),
    ]


def write_peft_adapter(directory: Path, base: Path, kind: PeftAdapter, seed: int) -> Path:
    """Write an adapter with weights of its own everywhere, and its tokenizer where its tokens aren't the base's."""
    fields = {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 8, **kind.fields}
    with advice_off():
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            resized(load_base(base), kind.size), LoraConfig(task_type="CAUSAL_LM", **fields)
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(_trained(name, parameter, noise))
    with advice_off():
        model.save_pretrained(directory)
    tokenizer: Any = load_tokenizer(base)
    if kind.size is not None and kind.size > len(tokenizer):
        tokenizer.add_tokens([AddedToken(token, special=True) for token in NEW_TOKENS])
        tokenizer.save_pretrained(directory)
    elif kind.size is not None:
        write_tokenizer(directory, kind.size)
    return directory


def load_peft_adapter(model: Any, directory: Path, kind: PeftAdapter) -> Any:
    """Return what peft makes of an adapter and the base's model, which belongs to it then, as load_base gives it."""
    with advice_off():
        from peft import PeftModel

        return PeftModel.from_pretrained(resized(model, kind.size), directory).eval()


def load_base(base: Path) -> Any:
    """Return what transformers makes of a checkpoint, in float32."""
    from transformers import AutoModelForCausalLM

    with advice_off():
        return AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        ).eval()


def resized(model: Any, size: int | None) -> Any:
    """Return the model with so many rows; those that nobody trains are the same wherever they are made."""
    if size is not None:
        torch.manual_seed(7)
        model.resize_token_embeddings(size, mean_resizing=False)
    return model


def _trained(name: str, parameter: Tensor, noise: Tensor) -> Tensor:
    """Return what training made of a parameter: factors begin at nothing, everything else where the base is."""
    factors = "lora" in name and "magnitude" not in name
    return noise * 0.1 if factors else parameter + noise * 0.1
