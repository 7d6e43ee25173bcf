"""What an adapter_config.json says: a frozen AdapterSpec, or a refusal that names the field.

Knows nothing of tensors or files; ``AdapterSpec.parse`` takes the decoded JSON. A field that would change
what the adapter computes is understood or refused, never ignored; what only mattered in training passes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from manylora.adapters import config_fields as read
from manylora.adapters.config_fields import CONFIG_FILE
from manylora.adapters.errors import InvalidAdapter
from manylora.adapters.invocation import read_invocation
from manylora.adapters.kinds import refuse_other_kinds
from manylora.adapters.patterns import KeyPatterns, LayerNumbers, Selector, check_work
from manylora.adapters.token_fields import read_saved_modules, read_trained_tokens

__all__ = ["ALL_LINEAR", "CONFIG_FILE", "AdapterSpec"]
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class AdapterSpec:
    """A LoRA config as peft means it. Module paths are those of the base, without peft's prefix."""

    rank: int
    alpha: float
    target_modules: str | tuple[str, ...]
    """A regex for the whole path, "all-linear", or names that paths end with."""
    exclude_modules: str | tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    """Whether each adapted row of the base is scaled to a trained length (2402.09353)."""
    bias: str = "none"
    """Which biases of the base it brings: see kinds.BIASES."""
    lora_bias: bool = False
    """Whether each B has a bias, which is scaled as B is."""
    layers_to_transform: tuple[int, ...] = ()
    """Empty means all layers."""
    layers_pattern: tuple[str, ...] = ()
    base_model: str | None = None
    fan_in_fan_out: bool = False
    """How the trained base stored its weight; the factors are laid out the same either way."""
    invocation: tuple[int, ...] = ()
    """Token ids from whose last occurrence in a prompt on it acts (aLoRA); (): it always does."""
    saved_modules: frozenset[str] = frozenset()
    """Those of TOKEN_MODULES that were trained whole."""
    trained_tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Ids whose rows were trained, by one of TOKEN_MODULES."""
    ensures_tying: bool = False
    """Whether a head that is the base's embedding stays the adapter's embedding, whatever that becomes."""

    @classmethod
    def parse(cls, config: Mapping[str, object]) -> "AdapterSpec":
        """Read a decoded adapter_config.json.

        Raises UnsupportedAdapter for a kind that is not served and InvalidAdapter for a malformed field.
        """
        refuse_other_kinds(config)
        ranks, alphas = read.patterns(config, "rank_pattern"), read.patterns(config, "alpha_pattern")
        spec = cls(
            rank=read.rank(config.get("r", 8), "r"),
            alpha=read.number(config.get("lora_alpha", 8), "lora_alpha"),
            target_modules=read.targets(config.get("target_modules"), "target_modules"),
            exclude_modules=read.targets(config.get("exclude_modules") or (), "exclude_modules"),
            rank_pattern={key: read.rank(value, key) for key, value in ranks.items()},
            alpha_pattern={key: read.number(value, key) for key, value in alphas.items()},
            use_rslora=read.flag(config, "use_rslora"),
            use_dora=read.flag(config, "use_dora"),
            bias=str(config.get("bias") or "none"),
            lora_bias=read.flag(config, "lora_bias"),
            layers_to_transform=read.layers(config.get("layers_to_transform")),
            layers_pattern=read.layer_names(config.get("layers_pattern")),
            base_model=read.optional_text(config, "base_model_name_or_path"),
            fan_in_fan_out=read.flag(config, "fan_in_fan_out"),
            invocation=read_invocation(config),
            saved_modules=read_saved_modules(config),
            trained_tokens=read_trained_tokens(config),
            ensures_tying=read.flag(config, "ensure_weight_tying"),
        )
        if not spec.target_modules:
            raise read.malformed("target_modules", "is missing; a LoRA config names the modules it adapts")
        if spec.lora_bias and spec.use_dora:
            raise read.malformed("lora_bias", "doesn't go with use_dora, in peft neither")
        if spec.layers_to_transform and isinstance(spec.target_modules, str):
            raise read.malformed("layers_to_transform", "needs target_modules to be a list")
        try:
            spec._check_patterns()
        except InvalidAdapter as error:
            error.file = error.file or CONFIG_FILE
            raise
        return spec

    def targets(self, path: str) -> bool:
        """Return whether the module at ``path`` is adapted, by peft's rules; "all-linear" takes every one."""
        if self.exclude_modules and self._excluded.matches(path):
            return False
        if isinstance(self.target_modules, str):
            return self.target_modules.lower() == ALL_LINEAR or self._targeted.matches(path)
        if path in self.target_modules or not self.layers_to_transform:
            return self._targeted.matches(path)
        return self._targeted.matches(path) and self._layer_numbers.of(path) in self._layers

    def rank_of(self, path: str) -> int:
        """Return the rank of the module at ``path``."""
        key = self._rank_keys.first(path)
        return self.rank if key is None else self.rank_pattern[key]

    def scale_of(self, path: str) -> float:
        """Return α/r of the module at ``path``, or α/√r with rsLoRA (arXiv 2312.03732)."""
        key = self._alpha_keys.first(path)
        alpha = self.alpha if key is None else self.alpha_pattern[key]
        rank = self.rank_of(path)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def named_targets(self) -> tuple[str, ...]:
        """Return what target_modules says, sorted, for people to read."""
        named = self.target_modules
        return (named,) if isinstance(named, str) else tuple(sorted(named))

    # Compiled once: a config is held against every module of the base.

    @cached_property
    def _targeted(self) -> Selector:
        return Selector(self.target_modules, "target_modules")

    @cached_property
    def _excluded(self) -> Selector:
        return Selector(self.exclude_modules, "exclude_modules")

    @cached_property
    def _layers(self) -> frozenset[int | None]:
        return frozenset(self.layers_to_transform)

    @cached_property
    def _layer_numbers(self) -> LayerNumbers:
        return LayerNumbers(self.layers_pattern, "layers_pattern")

    @cached_property
    def _rank_keys(self) -> KeyPatterns:
        return KeyPatterns(self.rank_pattern, "rank_pattern")

    @cached_property
    def _alpha_keys(self) -> KeyPatterns:
        return KeyPatterns(self.alpha_pattern, "alpha_pattern")

    def _check_patterns(self) -> None:
        """Raise InvalidAdapter for what is no pattern, can't be matched in linear time, or is too much together."""
        users = (self._targeted, self._excluded, self._layer_numbers, self._rank_keys, self._alpha_keys)
        check_work(regex for user in users for regex in user.regexes)
