"""From config.json to a decoder's shape: as transformers reads it, and what isn't served is named."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from manylora.server.model.errors import UnsupportedModel
from manylora.server.model.families import FAMILIES, model_config
from manylora.server.model.fields import HARMLESS
from manylora.server.model.rope import rope_tables
from manylora.server.model.rope_config import rope_config

SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
CLASSES: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}
READ = {
    *SMALL,
    "attention_bias",
    "head_dim",
    "hidden_act",
    "is_encoder_decoder",
    "layer_types",
    "max_window_layers",
    "mlp_bias",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "tie_word_embeddings",
    "use_sliding_window",
}


def config(kind: str = "llama", **fields: Any) -> dict[str, Any]:
    return {"model_type": kind, **SMALL, **fields}


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_field_of_transformers_config_is_read_or_harmless(kind: str) -> None:
    """A field that a newer transformers adds fails here until somebody has looked at what it does."""
    fields = {field.name for field in dataclasses.fields(CLASSES[kind]) if not field.name.startswith("_")}
    assert fields - READ - HARMLESS == set()


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"head_dim": 64, "tie_word_embeddings": True},
        {"num_key_value_heads": 4, "head_dim": 32},
        {"attention_bias": True, "mlp_bias": True},
        {"use_sliding_window": True, "max_window_layers": 2},
        {"rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0},
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 5e5},
    ],
)
def test_a_config_means_what_it_means_to_transformers(
    kind: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    """What transformers makes of a config, all defaults filled in, gives the same decoder as the config itself."""
    raw = config(kind, **fields)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    filled = AutoConfig.from_pretrained(tmp_path).to_dict()
    if kind not in ("llama", "qwen3"):
        # transformers keeps fields that the family hasn't, as we do, and neither reads them.
        filled = {"attention_bias": False, "mlp_bias": False, **filled}
    assert model_config(filled) == model_config(raw)


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_a_silent_config_means(kind: str, tmp_path: Path) -> None:
    """Fields that have a default in transformers, left out."""
    raw = config(kind, num_attention_heads=32, hidden_size=4096)
    del raw["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    theirs = AutoConfig.from_pretrained(tmp_path)
    ours = model_config(raw)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 128)
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.tied_head == theirs.tie_word_embeddings
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    window = theirs.sliding_window if kind == "mistral" else None
    assert ours.windows == ((window,) * 4 if window else ())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_as_many_key_value_heads_as_heads(kind: str) -> None:
    assert model_config(config(kind, num_key_value_heads=None)).num_kv_heads == 4


def test_windows_by_layer() -> None:
    assert model_config(config("mistral", sliding_window=None)).windows == ()
    assert model_config(config("qwen2", sliding_window=None, use_sliding_window=True)).windows == ()
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    ours = model_config(config("qwen3", use_sliding_window=True, sliding_window=64, layer_types=kinds))
    assert ours.windows == (None, 64, None, 64)
    first = model_config(config("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=3))
    assert first.windows == (None, None, None, 64)
    every = model_config(config("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=0))
    assert every.windows == (64,) * 4
    assert model_config(config("mistral", sliding_window=64)).windows == (64,) * 4


ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "yarn, factor from lengths": {
        "rope_type": "yarn",
        "factor": None,
        "original_max_position_embeddings": 128,
    },
    "yarn, mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "beta_fast": 16,
        "beta_slow": 2,
    },
    "yarn, own attention factor, not truncated": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "attention_factor": 1.25,
        "truncate": False,
    },
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_tables_are_those_of_transformers(name: str) -> None:
    theirs = LlamaConfig(**SMALL, rope_parameters=dict(ROPES[name]))
    ours = rope_config({"rope_scaling": ROPES[name]}, 512)
    if ours.kind == "default":
        frequencies, scale = 10_000.0 ** -(torch.arange(0, 32, 2).float() / 32), 1.0
    else:
        frequencies, scale = ROPE_INIT_FUNCTIONS[ours.kind](theirs, torch.device("cpu"))
    angles = torch.outer(torch.arange(512.0), frequencies).repeat(1, 2)
    cos, sin = rope_tables(ours, 32, 512, torch.device("cpu"))
    torch.testing.assert_close(cos, angles.cos() * scale, rtol=0, atol=2e-5)
    torch.testing.assert_close(sin, angles.sin() * scale, rtol=0, atol=2e-5)


def test_the_trained_length_may_stand_beside_the_section() -> None:
    section = {key: value for key, value in ROPES["yarn"].items() if not key.startswith("original")}
    beside = rope_config({"rope_scaling": section, "original_max_position_embeddings": 128}, 512)
    assert beside == rope_config({"rope_scaling": ROPES["yarn"]}, 512)


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(UnsupportedModel) as refused:
        model_config(raw)
    return str(refused.value)


@pytest.mark.parametrize(
    "kind", ["gpt2", "mixtral", "qwen2_moe", "gemma2", "phi3", "qwen2_vl", "deepseek_v3"]
)
def test_other_families_are_refused_with_those_that_are_served(kind: str) -> None:
    message = refusal(config(kind))
    assert repr(kind) in message
    assert "llama, mistral, qwen2, qwen3" in message


def test_the_first_qwen_is_refused_with_its_successor() -> None:
    assert "Qwen2.5" in refusal(config("qwen"))
    assert "None" in refusal({})


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("llama", {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope'"),
        ("qwen2", {"rope_scaling": {"type": "mrope"}}, "'mrope'"),
        ("qwen2", {"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, "mrope_section"),
        ("qwen2", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "needs factor"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ("llama", {"rope_scaling": {**ROPES["llama3"], "low_freq_factor": 4.0}}, "high_freq_factor"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor is '2'"),
        ("llama", {"rope_scaling": [1]}, "not an object"),
        ("llama", {"rope_scaling": ROPES["yarn"], "original_max_position_embeddings": 64}, "twice"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
        ("llama", {"num_local_experts": 8}, "num_local_experts"),
        ("qwen3", {"num_experts": 128}, "num_experts"),
        ("mistral", {"n_routed_experts": 64}, "n_routed_experts"),
        ("llama", {"attention_multiplier": 0.015625}, "attention_multiplier"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("llama", {"embedding_multiplier": 12.0}, "embedding_multiplier"),
        ("qwen2", {"is_causal": False}, "is_causal"),
        ("qwen2", {"dual_chunk_attention_config": {"chunk_size": 262144}}, "dual_chunk_attention_config"),
        ("mistral", {"vision_config": {}}, "vision_config"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}, "auto_map"),
        ("llama", {"sliding_window": 4096}, "sliding_window"),
        ("llama", {"layer_types": ["full_attention", "chunked_attention"] * 2}, "layer_types"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types"),
        ("mistral", {"sliding_window": "4096"}, "sliding_window"),
        ("mistral", {"sliding_window": 0}, "sliding_window"),
        ("qwen3", {"layer_types": ["linear_attention"] * 4}, "layer_types"),
        ("qwen3", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 4}, "use_sliding_window is off"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": None}, "max_window_layers"),
        ("llama", {"num_key_value_heads": 3}, "4 attention heads can't share 3"),
        ("llama", {"head_dim": 31}, "head_dim 31"),
        ("llama", {"num_attention_heads": 3, "num_key_value_heads": 3}, "multiple of 3 heads"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers"),
        ("llama", {"vocab_size": None}, "vocab_size"),
        ("llama", {"hidden_size": True}, "hidden_size"),
        ("llama", {"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ("llama", {"attention_bias": "yes"}, "attention_bias"),
    ],
)
def test_what_is_not_served_is_named(kind: str, fields: dict[str, Any], named: str) -> None:
    assert named in refusal(config(kind, **fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 0, "logits_scaling": 1.0, "is_causal": True, "partial_rotary_factor": 1.0},
        {
            "final_logit_softcapping": None,
            "pretraining_tp": 1,
            "unsloth_fixed": True,
            "torch_dtype": "bfloat16",
        },
        {
            "architectures": ["LlamaForCausalLM"],
            "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]},
        },
        {"hidden_act": "swish", "rope_scaling": None, "use_mrope": False, "tie_word_embeddings": None},
        {"rope_scaling": {**ROPES["yarn"], "finetuned": True}},
    ],
)
def test_remarks_and_neutral_values_pass(fields: dict[str, Any]) -> None:
    assert model_config(config(**fields)).num_layers == 4
