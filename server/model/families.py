"""Families: from a Hugging Face config.json to a ModelConfig. Differences are told by values, never by names.

A family is admitted by its ``model_type`` here and by a test that holds its logits against transformers.
"""

import math
from collections.abc import Callable, Mapping
from typing import cast

from server.model.config import ModelConfig, RopeConfig
from server.model.errors import UnsupportedModel

HfConfig = Mapping[str, object]
ROPE_KINDS = ("default", "linear", "llama3", "yarn")
HINTS = {"qwen": "the first Qwen needs code from its checkpoint; use Qwen2.5, whose architecture is built in"}


def model_config(config: HfConfig) -> ModelConfig:
    """Return the shape of the decoder that ``config`` describes. Raises UnsupportedModel naming the field."""
    kind = str(config.get("model_type"))
    family = FAMILIES.get(kind)
    if family is None:
        hint = HINTS.get(kind, f"served are {', '.join(sorted(FAMILIES))}")
        raise UnsupportedModel(f"model_type {kind!r} is not served: {hint}")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModel(f"hidden_act {activation!r} is not served, silu is")
    return family(config)


def _llama(config: HfConfig) -> ModelConfig:
    bias = bool(config.get("attention_bias", False))
    return _common(config, qkv_bias=bias, output_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))


def _mistral(config: HfConfig) -> ModelConfig:
    return _common(config, windows=_windows(config, config.get("sliding_window")))


def _qwen2(config: HfConfig) -> ModelConfig:
    return _common(config, qkv_bias=True, windows=_qwen_windows(config))


def _qwen3(config: HfConfig) -> ModelConfig:
    bias = bool(config.get("attention_bias", False))
    return _common(config, qkv_bias=bias, output_bias=bias, qk_norm=True, windows=_qwen_windows(config))


FAMILIES: Mapping[str, Callable[[HfConfig], ModelConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}


def _common(
    config: HfConfig,
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    windows: tuple[int | None, ...] = (),
) -> ModelConfig:
    heads, hidden = _integer(config, "num_attention_heads"), _integer(config, "hidden_size")
    head_dim = config.get("head_dim") or hidden // heads
    positions = _integer(config, "max_position_embeddings")
    return ModelConfig(
        vocab_size=_integer(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_integer(config, "intermediate_size"),
        num_layers=_integer(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=cast(int, config.get("num_key_value_heads") or heads),
        head_dim=cast(int, head_dim),
        max_position=positions,
        rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
        rope=_rope(config, positions),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        tied_head=bool(config.get("tie_word_embeddings", False)),
        windows=windows,
    )


def _windows(config: HfConfig, window: object) -> tuple[int | None, ...]:
    """Return one window for every layer; none where the whole context fits."""
    if not isinstance(window, int):
        return ()
    return (window,) * _integer(config, "num_hidden_layers")


def _qwen_windows(config: HfConfig) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    if not config.get("use_sliding_window", False) or not isinstance(window, int):
        return ()
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    full = _integer(config, "max_window_layers")
    return tuple(window if layer >= full else None for layer in range(_integer(config, "num_hidden_layers")))


def _rope(config: HfConfig, positions: int) -> RopeConfig:
    """Read transformers 5's rope_parameters, or rope_theta and rope_scaling as before."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    section = cast(HfConfig, given) if isinstance(given, Mapping) else {}
    kind = str(section.get("rope_type") or section.get("type") or "default")
    if kind not in ROPE_KINDS:
        raise UnsupportedModel(f"rope type {kind!r} is not served; {', '.join(ROPE_KINDS)} are")
    theta = _number(section, "rope_theta", _number(config, "rope_theta", 10_000.0))
    factor = _number(section, "factor", 1.0)
    original = section.get("original_max_position_embeddings") or positions
    attention = section.get("attention_factor")
    return RopeConfig(
        theta=theta,
        kind=kind,  # type: ignore[arg-type]  # checked above
        factor=factor,
        low_freq_factor=_number(section, "low_freq_factor", 1.0),
        high_freq_factor=_number(section, "high_freq_factor", 4.0),
        original_max_position=int(cast(int, original)),
        beta_fast=_number(section, "beta_fast", 32.0),
        beta_slow=_number(section, "beta_slow", 1.0),
        attention_factor=_yarn_attention(factor) if attention is None else float(cast(float, attention)),
    )


def _yarn_attention(factor: float) -> float:
    """Return YaRN's temperature on attention, 0.1 ln(factor) + 1 (2309.00071, equation 22)."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _integer(config: HfConfig, key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int):
        raise UnsupportedModel(f"config.json: {key} is {value!r}, not a number")
    return value


def _number(config: HfConfig, key: str, default: float) -> float:
    value = config.get(key)
    return float(value) if isinstance(value, int | float) else default
