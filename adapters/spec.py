"""What an adapter_config.json says: a frozen AdapterSpec, or a refusal that names the field.

Knows nothing of tensors or files; ``AdapterSpec.parse`` takes the decoded JSON. A field that would change
what the adapter computes is understood or refused, never ignored; what only mattered in training passes.
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from manylora.adapters.errors import InvalidAdapter, UnsupportedAdapter
from manylora.adapters.patterns import KeyPatterns, LayerNumbers, Selector, check_work

CONFIG_FILE = "adapter_config.json"
ALL_LINEAR = "all-linear"

_READ = frozenset(
    [
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "target_modules",
        "exclude_modules",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "layers_to_transform",
        "layers_pattern",
        "base_model_name_or_path",
        "fan_in_fan_out",
        "init_lora_weights",
        "bias",
    ]
)
_TRAINING_ONLY = frozenset(
    [
        "auto_mapping",
        "peft_version",
        "revision",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
        "eva_config",
        "loftq_config",
        "corda_config",
        "lora_ga_config",
        "ensure_weight_tying",
    ]
)
"""Fields that change nothing once the tensors exist, whatever their value."""

_NOT_SERVED = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules saved beside the factors",
    "lora_bias": "biases in the factors",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "factors of bare parameters",
    "megatron_config": "Megatron layers",
    "use_qalora": "QALoRA",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "use_bdlora": "block-diagonal LoRA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
}
_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 3, 120, 120
_TASKS = ("CAUSAL_LM", "FEATURE_EXTRACTION")
"""The second is what sentence-transformers trains, on a model without its head."""
_PLAIN_INITS = frozenset(("true", "false", "gaussian", "eva", "orthogonal", "mica"))
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


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
    layers_to_transform: tuple[int, ...] = ()
    """Empty means all layers."""
    layers_pattern: tuple[str, ...] = ()
    base_model: str | None = None
    fan_in_fan_out: bool = False
    """How the trained base stored its weight; the factors are laid out the same either way."""

    @classmethod
    def parse(cls, config: Mapping[str, object]) -> "AdapterSpec":
        """Read a decoded adapter_config.json.

        Raises UnsupportedAdapter for a kind that is not served and InvalidAdapter for a malformed field.
        """
        _refuse_other_kinds(config)
        ranks, alphas = _patterns(config, "rank_pattern"), _patterns(config, "alpha_pattern")
        spec = cls(
            rank=_rank(config.get("r", 8), "r"),
            alpha=_number(config.get("lora_alpha", 8), "lora_alpha"),
            target_modules=_targets(config.get("target_modules"), "target_modules"),
            exclude_modules=_targets(config.get("exclude_modules") or (), "exclude_modules"),
            rank_pattern={key: _rank(value, key) for key, value in ranks.items()},
            alpha_pattern={key: _number(value, key) for key, value in alphas.items()},
            use_rslora=_flag(config, "use_rslora"),
            layers_to_transform=_layers(config.get("layers_to_transform")),
            layers_pattern=_layer_names(config.get("layers_pattern")),
            base_model=_optional_text(config, "base_model_name_or_path"),
            fan_in_fan_out=_flag(config, "fan_in_fan_out"),
        )
        if not spec.target_modules:
            raise _malformed("target_modules", "is missing; a LoRA config names the modules it adapts")
        if spec.layers_to_transform and isinstance(spec.target_modules, str):
            raise _malformed("layers_to_transform", "needs target_modules to be a list")
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


def _refuse_other_kinds(config: Mapping[str, object]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedAdapter(f"peft_type is {_shown(kind)}; only LORA is served", file=CONFIG_FILE)
    for key, what in _NOT_SERVED.items():
        if config.get(key):
            raise UnsupportedAdapter(f"{key} is set: {what} is a kind not served yet", file=CONFIG_FILE)
    bias = config.get("bias")
    if bias not in (None, "none"):
        raise UnsupportedAdapter(f"bias is {_shown(bias)}: a kind not served yet", file=CONFIG_FILE)
    task = config.get("task_type")
    if task not in (None, *_TASKS):
        raise UnsupportedAdapter(
            f"task_type is {_shown(task)}; {' and '.join(_TASKS)} are served", file=CONFIG_FILE
        )
    _refuse_changed_base(config.get("init_lora_weights", True))
    known = _READ | _TRAINING_ONLY | _NOT_SERVED.keys()
    for key in sorted(config.keys() - known):
        if config[key]:
            raise UnsupportedAdapter(
                f"field {_shown(key)} is not known and may change what the adapter computes",
                file=CONFIG_FILE,
            )


def _refuse_changed_base(init: object) -> None:
    """PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ move part of the base into the factors: it is another base."""
    name = str(init).lower() if isinstance(init, str | bool) else _shown(init)
    if name.startswith(_BASE_CHANGING_INITS):
        raise UnsupportedAdapter(
            f"init_lora_weights is {_shown(init)}: this adapter belongs to a changed base and would be wrong on the"
            " plain one; convert it with save_pretrained(path_initial_model_for_weight_conversion=…)",
            file=CONFIG_FILE,
        )
    if init is not None and name not in _PLAIN_INITS:
        raise UnsupportedAdapter(
            f"init_lora_weights {_shown(init)} is a kind not served yet", file=CONFIG_FILE
        )


def _shown(value: object) -> str:
    """Return what a config says, as far as a message has room for it."""
    return _BRIEF.repr(value)


def _malformed(key: str, what: str) -> InvalidAdapter:
    return InvalidAdapter(f"{key} {what}", file=CONFIG_FILE)


def _rank(value: object, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _malformed(key, f"is {_shown(value)}; a rank is an integer from 1 up")
    return value


def _number(value: object, key: str) -> float:
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer that no float holds
        number = math.inf
    if not math.isfinite(number):
        raise _malformed(key, f"is {_shown(value)}; expected a finite number")
    return number


def _flag(config: Mapping[str, object], key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise _malformed(key, f"is {_shown(value)}; expected true or false")
    return bool(value)


def _optional_text(config: Mapping[str, object], key: str) -> str | None:
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise _malformed(key, f"is {_shown(value)}; expected a string")
    return value


def _texts(value: object, key: str) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) and item for item in value):
        raise _malformed(key, f"is {_shown(value)}; expected a list of names")
    return tuple(value)


def _targets(value: object, key: str) -> str | tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return value
    return _texts(value, key)


def _patterns(config: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = config.get(key) or {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise _malformed(key, f"is {_shown(value)}; expected an object")
    return value


def _layers(value: object) -> tuple[int, ...]:
    layers = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in layers):
        raise _malformed("layers_to_transform", f"is {_shown(value)}; expected layer numbers from 0 up")
    return tuple(layers)


def _layer_names(value: object) -> tuple[str, ...]:
    return _texts([value] if isinstance(value, str) and value else value or (), "layers_pattern")
