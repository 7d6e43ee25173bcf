"""A registry in a directory of its own, and a base for adapters that peft makes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from manylora.adapters.registry import AdapterRegistry
from tests.adapters.making import HIDDEN, KV, LAYERS, MLP, VOCABULARY


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the registry's file is, or will be."""
    return tmp_path / "adapters.db"


@pytest.fixture
def registry(path: Path) -> Iterator[AdapterRegistry]:
    """One that is open, for a base named "base"."""
    with AdapterRegistry(path, reserved=["base"]) as opened:
        yield opened


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    """One of random weights, whose modules are MODULES."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=MLP,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4 * KV // HIDDEN,
        )
    )
