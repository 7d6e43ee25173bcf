"""From config.json's rope section to a RopeConfig: transformers 5's rope_parameters, or rope_theta and rope_scaling.

What transformers would read and this doesn't is refused by its name.
"""

import math
from collections.abc import Mapping

from manylora.server.model.config import RopeConfig
from manylora.server.model.errors import UnsupportedModel

HfConfig = Mapping[str, object]

KINDS = ("default", "linear", "llama3", "yarn")
WHY_NOT = {
    "dynamic": ": its angles depend on the length of the sequence, so cached keys would go stale",
    "longrope": ": its angles depend on the length of the sequence, so cached keys would go stale",
}
DEFAULT_THETA = 10_000.0
NEEDED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
}
"""Keys without which a kind means nothing; YaRN's factor can be told from the two lengths."""
KNOWN = {
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "partial_rotary_factor",  # refused unless 1, below
    "finetuned",  # a remark that YaRN's first checkpoints carry
}


def rope_config(config: HfConfig, positions: int) -> RopeConfig:
    """Return how ``config`` rotates; ``positions`` is its max_position_embeddings. Raises UnsupportedModel."""
    section = _section(config)
    kind = str(section.get("rope_type") or section.get("type") or "default")
    if kind not in KINDS:
        raise UnsupportedModel(
            f"rope type {kind!r} is not served{WHY_NOT.get(kind, '')}; {', '.join(KINDS)} are"
        )
    for key in NEEDED[kind]:
        if section.get(key) is None:
            raise UnsupportedModel(f"config.json: rope type {kind!r} needs {key}")
    original = _original_positions(config, section, positions)
    factor = number(section, "factor", positions / original if kind == "yarn" else 1.0)
    low, high = number(section, "low_freq_factor", 1.0), number(section, "high_freq_factor", 4.0)
    if kind == "llama3" and high <= low:
        raise UnsupportedModel(f"config.json: high_freq_factor {high:g} is not above low_freq_factor {low:g}")
    return RopeConfig(
        theta=number(section, "rope_theta", number(config, "rope_theta", DEFAULT_THETA)),
        kind=kind,  # type: ignore[arg-type]  # checked above
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position=original,
        beta_fast=number(section, "beta_fast", 32.0),
        beta_slow=number(section, "beta_slow", 1.0),
        attention_factor=_attention_factor(section, factor),
        truncate=bool(section.get("truncate", True)),
    )


def _section(config: HfConfig) -> HfConfig:
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise UnsupportedModel(f"config.json: rope_parameters is {given!r}, not an object")
    unknown = next((key for key in given if key not in KNOWN), None)
    if unknown is not None:
        raise UnsupportedModel(f"config.json: rope_parameters' {unknown!r} is not served")
    for source in (config, given):
        if number(source, "partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedModel("config.json: partial_rotary_factor other than 1 is not served")
    return given


def _original_positions(config: HfConfig, section: HfConfig, positions: int) -> int:
    """Return the trained length, which may be given in the section, beside it, or not: then it is ``positions``."""
    key = "original_max_position_embeddings"
    given = [value for value in (section.get(key), config.get(key)) if value is not None]
    if len(set(given)) > 1:
        raise UnsupportedModel(f"config.json gives {key} twice: {given[0]} and {given[1]}")
    value = given[0] if given else positions
    if not isinstance(value, int) or value < 1:
        raise UnsupportedModel(f"config.json: {key} is {value!r}, not a number of tokens")
    return value


def _attention_factor(section: HfConfig, factor: float) -> float:
    """Return what YaRN multiplies cos and sin with (2309.00071, equation 22), as DeepSeek extends it by mscale."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if section.get("attention_factor") is not None:
        return number(section, "attention_factor", 1.0)
    over, under = number(section, "mscale", 0.0), number(section, "mscale_all_dim", 0.0)
    return scale(over) / scale(under) if over and under else scale(1.0)


def number(section: HfConfig, key: str, default: float) -> float:
    """Return a number, ``default`` where there is none. Raises UnsupportedModel for anything else."""
    value = section.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UnsupportedModel(f"config.json: {key} is {value!r}, not a number")
    return float(value)
