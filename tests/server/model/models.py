"""Small random models of every family, written by transformers as true checkpoints."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

SMALL = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

FAMILIES: Mapping[str, Callable[[], PretrainedConfig]] = {
    "llama2": lambda: LlamaConfig(**{**SMALL, "num_key_value_heads": 4}, tie_word_embeddings=False),
    "llama3": lambda: LlamaConfig(**SMALL, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "llama-linear": lambda: LlamaConfig(
        **SMALL, rope_parameters=LINEAR_ROPE, attention_bias=True, mlp_bias=True
    ),
    "llama-yarn": lambda: LlamaConfig(**SMALL, rope_parameters=YARN_ROPE),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=24, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**SMALL, tie_word_embeddings=True),
    "qwen2-window": lambda: Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=20, max_window_layers=1, tie_word_embeddings=False
    ),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=64, tie_word_embeddings=True),
}


def random_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a model whose weights, biases and norms are all random, so that none of them can be left out."""
    torch.manual_seed(sum(name.encode()))
    model = AutoModelForCausalLM.from_config(FAMILIES[name](), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.08)
    return model.to(dtype).eval()


def save_model(name: str, directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = random_model(name, dtype)
    model.save_pretrained(directory, max_shard_size="300KB")
    return model
