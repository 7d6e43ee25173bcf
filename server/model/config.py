"""What a decoder looks like: one dataclass whose switches say how families differ. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from manylora.server.kernels.shape import DecoderShape

FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""The matrices of a layer, and the modules that each is stacked of."""
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding: base frequency and how it is scaled beyond the trained context.

    ``kind`` is transformers' ``rope_type``; ``linear`` uses factor; ``llama3`` uses factor, low_freq_factor,
    high_freq_factor and original_max_position; ``yarn`` uses factor, original_max_position, beta_fast,
    beta_slow, attention_factor; ``dynamic`` is refused by the family, since its angles depend on the length.
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    """YaRN: whether the ends of its ramp are rounded to whole dimensions."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape and structural switches of one decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    rms_norm_eps: float
    rope: RopeConfig = field(default_factory=RopeConfig)
    qkv_bias: bool = False
    output_bias: bool = False
    """Bias of o_proj."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over head_dim on q and k before rope (Qwen3)."""
    tied_head: bool = False
    windows: tuple[int | None, ...] = ()
    """Sliding window of each layer in tokens (a query sees itself and window − 1 before it); None is full."""

    @property
    def shape(self) -> DecoderShape:
        """What a backend must know of it."""
        paths = tuple(self.module_paths(layer) for layer in range(self.num_layers))
        modules = self.module_shapes()
        return DecoderShape(self.num_layers, self.num_heads, self.num_kv_heads, self.head_dim, modules, paths)

    def module_shapes(self) -> Mapping[str, tuple[int, int]]:
        """Return (out_features, in_features) of each LoRA module of a layer, by the names of LORA_MODULES."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (q, self.hidden_size),
            "k_proj": (kv, self.hidden_size),
            "v_proj": (kv, self.hidden_size),
            "o_proj": (self.hidden_size, q),
            "gate_proj": (self.intermediate_size, self.hidden_size),
            "up_proj": (self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }

    def module_paths(self, layer: int) -> Mapping[str, str]:
        """Return each LoRA module of a layer by its path in the Hugging Face model."""
        block = f"model.layers.{layer}"
        return {
            name: f"{block}.mlp.{name}" if name in MLP_MODULES else f"{block}.self_attn.{name}"
            for name in self.module_shapes()
        }

    def has_bias(self, path: str) -> bool:
        """Return whether a linear layer has a bias; by its path or its name."""
        module = path.rsplit(".", 1)[-1]
        if module in FUSED["qkv"]:
            return self.qkv_bias
        return self.output_bias if module in FUSED["o"] else self.mlp_bias

    def base_modules(self) -> dict[str, tuple[int, int]]:
        """Return (out_features, in_features) of every linear layer that an adapter may target, by its path."""
        shapes = self.module_shapes()
        return {
            path: shapes[name]
            for layer in range(self.num_layers)
            for name, path in self.module_paths(layer).items()
        }
