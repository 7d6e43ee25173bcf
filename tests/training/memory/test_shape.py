"""What a config.json says about a model's size."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from manylora.training.errors import BaseRefused, InvalidArgument
from manylora.training.memory.shape import ModelShape

FIRST_QWEN_7B = {
    "model_type": "qwen",
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
QWEN25_7B_CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_parameters_are_those_of_transformers_model(family: str, tied: bool) -> None:
    config = AutoConfig.for_model(
        family,
        vocab_size=320,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert ModelShape.from_config(config.to_dict()).parameters == sum(p.numel() for p in model.parameters())


def test_the_first_qwens_mlp_is_half_of_what_its_config_says() -> None:
    shape = ModelShape.from_config(FIRST_QWEN_7B)
    assert shape.intermediate_size == 11008
    assert shape.parameters == 7_721_324_544  # what its safetensors hold
    assert {name for name, _, _ in shape.adapted(())} == {"c_attn", "c_proj", "w1", "w2"}


def test_targets_of_the_first_qwen_mean_the_same_matrices_elsewhere() -> None:
    shape = ModelShape.from_config({**FIRST_QWEN_7B, "model_type": "llama", "intermediate_size": 11008})
    assert shape.adapted(("c_attn", "c_proj", "w1", "w2")) == shape.adapted(())
    assert [name for name, _, _ in shape.adapted(("c_proj",))] == ["o_proj", "down_proj"]
    with pytest.raises(InvalidArgument, match="wte"):
        shape.adapted(("wte",))


def test_stored_formats() -> None:
    def stored(**section: object) -> tuple[str | None, int, int]:
        shape = ModelShape.from_config({**FIRST_QWEN_7B, "quantization_config": section})
        return shape.quantization, shape.bits, shape.group_size

    assert stored(quant_method="gptq", bits=4, group_size=128) == ("gptq", 4, 128)
    assert stored(quant_method="awq", bits=4, group_size=64) == ("awq", 4, 64)
    assert stored(quant_method="bitsandbytes", load_in_4bit=True)[0] == "nf4"
    with pytest.raises(BaseRefused, match="fp8"):
        stored(quant_method="fp8")
    with pytest.raises(BaseRefused, match="8 bits"):
        stored(quant_method="bitsandbytes", load_in_8bit=True)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "bloom"}, "bloom"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": -1}, "vocab_size"),
    ],
)
def test_what_can_not_be_planned_for_is_refused(change: dict[str, object], named: str) -> None:
    with pytest.raises(BaseRefused, match=named):
        ModelShape.from_config({**FIRST_QWEN_7B, **change})
