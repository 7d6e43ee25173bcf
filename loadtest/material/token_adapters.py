"""Random adapters that change embedding and head, as peft itself writes them: whole modules, factors, tokens' rows,
tokens of their own. And the reference that each is read back into. Needs peft.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken

from manylora.adapters.tokenizer import load_tokenizer
from manylora.loadtest.material.quiet import advice_off

NEW_TOKENS = ("<|think|>", "<|done|>", "<|tool|>")


@dataclass(frozen=True, slots=True)
class TokenAdapter:
    """One adapter; ``fields`` go into its LoraConfig."""

    name: str
    fields: Mapping[str, object] = field(default_factory=dict)
    size: int | None = None
    """Rows that embedding and head are resized to first; None: as many as the base's."""


def token_kinds(vocab_size: int) -> list[TokenAdapter]:
    """Return one adapter of each kind, for a base of so many ids."""
    more, both = vocab_size + len(NEW_TOKENS), ["embed_tokens", "lm_head"]
    new = list(range(vocab_size, more))
    rows = {"embed_tokens": [*new, 5], "lm_head": [*new, 5]}
    return [
        TokenAdapter("whole embedding", {"modules_to_save": ["embed_tokens"]}),
        TokenAdapter("whole head", {"modules_to_save": ["lm_head"]}),
        TokenAdapter("both whole", {"modules_to_save": both}),
        TokenAdapter("factors of both", {"target_modules": ["q_proj", *both]}),
        TokenAdapter("factors of the head alone", {"target_modules": ["lm_head"], "use_rslora": True}),
        TokenAdapter("trained tokens", {"trainable_token_indices": [3, 70, 7, 200]}),
        TokenAdapter(
            "trained tokens of both", {"trainable_token_indices": {"embed_tokens": [9], "lm_head": [4, 9]}}
        ),
        TokenAdapter("added tokens, whole", {"modules_to_save": both}, more),
        TokenAdapter("added tokens, rows", {"trainable_token_indices": rows}, more),
        TokenAdapter("added tokens, factors too", {"target_modules": ["v_proj", *both]}, more),
        TokenAdapter("fewer tokens", {"modules_to_save": both}, vocab_size - 2),
    ]


def tied_kinds() -> list[TokenAdapter]:
    """Return adapters whose head stays the embedding, which a base without its own head has."""
    return [
        TokenAdapter("whole, tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        TokenAdapter(
            "factors, tied", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
        ),
    ]


def write_token_adapter(directory: Path, base: Path, kind: TokenAdapter, seed: int) -> Path:
    """Write an adapter with weights of its own everywhere, and its tokenizer where it has more tokens than the base."""
    from peft import LoraConfig, get_peft_model

    fields = {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 8, **kind.fields}
    with advice_off():
        model = get_peft_model(_base(base, kind), LoraConfig(task_type="CAUSAL_LM", **fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * 0.1 if "lora" in name else parameter + noise * 0.1)
    with advice_off():
        model.save_pretrained(directory)
    tokenizer: Any = load_tokenizer(base)
    if kind.size is not None and kind.size > tokenizer.vocab_size:
        tokenizer.add_tokens([AddedToken(token, special=True) for token in NEW_TOKENS])
        tokenizer.save_pretrained(directory)
    return directory


def load_token_adapter(base: Path, directory: Path, kind: TokenAdapter) -> Any:
    """Return what peft makes of base and adapter, in float32."""
    from peft import PeftModel

    with advice_off():
        return PeftModel.from_pretrained(_base(base, kind), directory).eval()


def _base(base: Path, kind: TokenAdapter) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    if kind.size is not None:
        torch.manual_seed(7)  # rows that nobody trains are the same wherever they are made
        model.resize_token_embeddings(kind.size, mean_resizing=False)
    return model
