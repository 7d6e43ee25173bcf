"""What a model's config.json says that an export must know: parameters and shapes, linear layers, the tied head.

transformers builds the model without memory (on the meta device) and answers. Only families whose checkpoint names
are its parameters' names are merged.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from manylora.adapters.export.errors import ExportRefused

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUANTIZATION_FIELDS = ("quantization_config", "compression_config")


@dataclass(frozen=True, slots=True)
class ModelOutline:
    """The parameters of a model, without them."""

    shapes: Mapping[str, tuple[int, ...]]
    """By name, in the model's order; the head is among them, tied or not."""
    linears: frozenset[str]
    """Weights of the decoder's linear layers: what 4-bit formats quantise, so not the head."""
    tied: bool


def outline_of(config: Mapping[str, object]) -> ModelOutline:
    """Return the outline of the model that ``config`` describes. Raises ExportRefused for other families."""
    model = empty_model(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    linears = frozenset(
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and f"{path}.weight" != HEAD
    )
    return ModelOutline(shapes, linears, bool(model.config.tie_word_embeddings))


def empty_model(config: Mapping[str, object]) -> Any:  # a PreTrainedModel, which ships no types
    """Return the model on the meta device, its rotary embedding real. Raises ExportRefused."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ExportRefused(f"model_type {kind!r} is not merged; {', '.join(FAMILIES)} are")
    plain = {key: value for key, value in config.items() if key not in QUANTIZATION_FIELDS}
    try:
        made = AutoConfig.for_model(**plain)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(made, dtype=torch.float32, attn_implementation="sdpa")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ExportRefused(f"config.json describes no model that transformers can build: {error}") from None
    # Its buffers are computed and in no checkpoint: they must be real.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=made)
    return model.eval()
