"""What a config.json says about a model's size. Weights are never opened."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from manylora.training.errors import BaseRefused, InvalidArgument

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen")
_ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FIRST_QWEN = ("c_attn", "c_proj", "w1", "w2")
_BIASES = {"qwen2": True, "qwen": True}


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder with a gated MLP. All are counts; nothing is in bytes."""

    family: str
    hidden_size: int
    intermediate_size: int
    """The MLP's width. The first Qwen's config.json says twice that: its gate and up projections are half each."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    """Whether the head is the embedding."""
    quantization: str | None = None
    """nf4, gptq or awq, when the checkpoint is stored quantised."""
    bits: int = 4
    """Bits of a stored code; 8 with some GPTQ checkpoints."""
    group_size: int = 128
    """Input values that share a scale in GPTQ and AWQ."""
    double_quant: bool = False
    """Whether the scales of stored NF4 are quantised too."""

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> "ModelShape":
        """Read a config.json.

        Raises BaseRefused when the family isn't one of ``FAMILIES`` or a size is missing or not a whole number.
        """
        family = config.get("model_type")
        if family not in FAMILIES:
            raise BaseRefused(
                f"model_type {family!r} can't be planned for: expected one of {', '.join(FAMILIES)}."
            )
        hidden, heads = _whole(config, "hidden_size"), _whole(config, "num_attention_heads")
        width = _whole(config, "intermediate_size")
        head_dim = _whole(config, "head_dim", _whole(config, "kv_channels", hidden // heads))
        section = config.get("quantization_config")
        quantization, bits, group_size = _quantization(section)
        return cls(
            family=str(family),
            hidden_size=hidden,
            intermediate_size=width // 2 if family == "qwen" else width,
            num_layers=_whole(config, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=_whole(config, "num_key_value_heads", heads),
            head_dim=head_dim,
            vocab_size=_whole(config, "vocab_size"),
            # transformers writes the key only where it differs from the family's default, which is False for these.
            tied=bool(config.get("tie_word_embeddings", False)),
            quantization=quantization,
            bits=bits,
            group_size=group_size,
            double_quant=isinstance(section, Mapping) and bool(section.get("bnb_4bit_use_double_quant")),
        )

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    @property
    def targets(self) -> tuple[str, ...]:
        """Names that LoRA goes on when none are asked for: every matrix of a layer."""
        return _FIRST_QWEN if self.family == "qwen" else _ALL_LINEAR

    def matrices(self) -> Iterator[tuple[str, int, int]]:
        """Yield (name, inputs, outputs) of one layer's matrices."""
        h, q, kv, m = self.hidden_size, self.query_size, self.kv_size, self.intermediate_size
        if self.family == "qwen":
            yield from (
                ("c_attn", h, q + 2 * kv),
                ("c_proj", q, h),
                ("w1", h, m),
                ("w2", h, m),
                ("c_proj", m, h),
            )
            return
        yield from (("q_proj", h, q), ("k_proj", h, kv), ("v_proj", h, kv), ("o_proj", q, h))
        yield from (("gate_proj", h, m), ("up_proj", h, m), ("down_proj", m, h))

    def adapted(self, targets: tuple[str, ...]) -> tuple[tuple[str, int, int], ...]:
        """Return the matrices of one layer that the targets name; none named means all.

        The first Qwen's names mean the same matrices of other families. Raises InvalidArgument for a name that no layer
        has.
        """
        wanted = set(self.targets if targets in ((), ("all-linear",)) else targets)
        names = {name for name, _, _ in self.matrices()}
        if self.family != "qwen" and wanted - names:
            from manylora.training.bases.targets import FIRST_QWEN_NAMES

            wanted = {own for name in wanted for own in FIRST_QWEN_NAMES.get(name, (name,))}
        if wanted - names:
            raise InvalidArgument(
                f"no layer of a {self.family} model has {', '.join(sorted(wanted - names))}: expected some of "
                f"{', '.join(dict.fromkeys(name for name, _, _ in self.matrices()))}."
            )
        return tuple(matrix for matrix in self.matrices() if matrix[0] in wanted)

    @property
    def layer_parameters(self) -> int:
        """Values in all layers' matrices: what 4-bit formats quantise."""
        return self.num_layers * sum(inputs * outputs for _, inputs, outputs in self.matrices())

    @property
    def small_parameters(self) -> int:
        """Values in norms and biases."""
        norms = (2 * self.num_layers + 1) * self.hidden_size
        norms += 2 * self.num_layers * self.head_dim if self.family == "qwen3" else 0
        return norms + self.num_layers * (self.query_size + 2 * self.kv_size) * _BIASES.get(
            self.family, False
        )

    @property
    def embedding_parameters(self) -> int:
        """Values in the embedding and, where it has its own, the head."""
        return self.vocab_size * self.hidden_size * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All values."""
        return self.layer_parameters + self.small_parameters + self.embedding_parameters


def _whole(config: Mapping[str, object], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BaseRefused(f"config.json: {key} is {value!r}, expected a whole number above 0.")
    return value


def _quantization(section: object) -> tuple[str | None, int, int]:
    """Return the name of the stored format, bits and group size."""
    if not isinstance(section, Mapping):
        return None, 4, 128
    method = str(section.get("quant_method", "bitsandbytes"))
    bits = section.get("bits", section.get("w_bit", 4))
    supported = {"gptq": (4, 8), "awq": (4,), "bitsandbytes": (4,)}
    if section.get("load_in_8bit") or bits not in supported.get(method, ()):
        raise BaseRefused(
            f"config.json: {method} at {8 if section.get('load_in_8bit') else bits} bits can't be trained on: expected "
            "gptq at 4 or 8, awq at 4 or bitsandbytes at 4."
        )
    group_size = section.get("group_size", section.get("q_group_size", 128))
    return ("nf4" if method == "bitsandbytes" else method), int(bits), _group(group_size)


def _group(size: object) -> int:
    """Return the group size; -1 is one group for all inputs, whose scales weigh nothing to speak of."""
    return size if isinstance(size, int) and size > 0 else 1 << 20
