"""Families: from a Hugging Face config.json to a ModelConfig. Differences are told by values, never by names.

A family is admitted by its ``model_type`` here and by a test that holds its logits against transformers.
"""

from collections.abc import Callable, Mapping

from manylora.server.model.config import ModelConfig
from manylora.server.model.errors import UnsupportedModel
from manylora.server.model.fields import check_fields
from manylora.server.model.rope_config import number, rope_config

HfConfig = Mapping[str, object]

HINTS = {"qwen": "the first Qwen needs code from its checkpoint; use Qwen2.5, whose architecture is built in"}
ACTIVATIONS = ("silu", "swish")
FULL, SLIDING = "full_attention", "sliding_attention"
# What transformers takes where config.json is silent, as far as families differ in it.
DEFAULTS: Mapping[str, HfConfig] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
}


def model_config(config: HfConfig) -> ModelConfig:
    """Return the shape of the decoder that ``config`` describes. Raises UnsupportedModel naming the field."""
    kind = str(config.get("model_type"))
    family = FAMILIES.get(kind)
    if family is None:
        hint = HINTS.get(kind, f"served are {', '.join(sorted(FAMILIES))}")
        raise UnsupportedModel(f"model_type {kind!r} is not served: {hint}")
    config = {**DEFAULTS[kind], **config}
    activation = config.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise UnsupportedModel(f"hidden_act {activation!r} is not served, silu is")
    check_fields(config)
    return family(config)


def _llama(config: HfConfig) -> ModelConfig:
    if config.get("sliding_window") is not None:
        raise UnsupportedModel("config.json: sliding_window is not served for model_type 'llama'")
    _check_layer_types(config, FULL)
    bias = _switch(config, "attention_bias")
    return _common(config, qkv_bias=bias, output_bias=bias, mlp_bias=_switch(config, "mlp_bias"))


def _mistral(config: HfConfig) -> ModelConfig:
    window = _window(config)
    _check_layer_types(config, FULL if window is None else SLIDING)
    return _common(
        config, windows=() if window is None else (window,) * _integer(config, "num_hidden_layers")
    )


def _qwen2(config: HfConfig) -> ModelConfig:
    return _common(config, qkv_bias=True, windows=_qwen_windows(config))


def _qwen3(config: HfConfig) -> ModelConfig:
    bias = _switch(config, "attention_bias")
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
    positions = _integer(config, "max_position_embeddings")
    heads, kv_heads, head_dim = _heads(config)
    return ModelConfig(
        vocab_size=_integer(config, "vocab_size"),
        hidden_size=_integer(config, "hidden_size"),
        intermediate_size=_integer(config, "intermediate_size"),
        num_layers=_integer(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position=positions,
        rms_norm_eps=number(config, "rms_norm_eps", 1e-6),
        rope=rope_config(config, positions),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        tied_head=_switch(config, "tie_word_embeddings"),
        windows=windows,
    )


def _heads(config: HfConfig) -> tuple[int, int, int]:
    """Return the number of heads, of KV heads, and the head dim."""
    heads, hidden = _integer(config, "num_attention_heads"), _integer(config, "hidden_size")
    kv_heads = heads if config.get("num_key_value_heads") is None else _integer(config, "num_key_value_heads")
    if heads % kv_heads:
        raise UnsupportedModel(f"config.json: {heads} attention heads can't share {kv_heads} key-value heads")
    given = config.get("head_dim") is not None
    if not given and hidden % heads:
        raise UnsupportedModel(f"config.json: hidden_size {hidden} is not a multiple of {heads} heads")
    head_dim = _integer(config, "head_dim") if given else hidden // heads
    if head_dim % 2:
        raise UnsupportedModel(f"config.json: head_dim {head_dim} is odd, and rope turns pairs")
    return heads, kv_heads, head_dim


def _window(config: HfConfig) -> int | None:
    return None if config.get("sliding_window") is None else _integer(config, "sliding_window")


def _qwen_windows(config: HfConfig) -> tuple[int | None, ...]:
    """Return each layer's window: layer_types where given, else all layers from max_window_layers on."""
    layers, kinds = _integer(config, "num_hidden_layers"), config.get("layer_types")
    window = _window(config) if _switch(config, "use_sliding_window") else None
    if kinds is None:
        full = config.get("max_window_layers")
        if window is None:
            return ()
        if not isinstance(full, int):
            raise UnsupportedModel(f"config.json: max_window_layers is {full!r}, not a number of layers")
        return tuple(window if layer >= full else None for layer in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {FULL, SLIDING}:
        raise UnsupportedModel(f"config.json: layer_types is not {layers} times {FULL} or {SLIDING}")
    if window is None and SLIDING in kinds:
        raise UnsupportedModel(f"config.json: layer_types has {SLIDING}, but use_sliding_window is off")
    return () if window is None else tuple(window if kind == SLIDING else None for kind in kinds)


def _check_layer_types(config: HfConfig, only: str) -> None:
    """Refuse layers of several kinds where the family has one."""
    kinds = config.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or set(kinds) - {only}):
        raise UnsupportedModel(
            f"config.json: layer_types other than {only} is not served for model_type {config['model_type']!r}"
        )


def _integer(config: HfConfig, key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UnsupportedModel(f"config.json: {key} is {value!r}, not a positive number")
    return value


def _switch(config: HfConfig, key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise UnsupportedModel(f"config.json: {key} is {value!r}, neither true nor false")
    return bool(value)
