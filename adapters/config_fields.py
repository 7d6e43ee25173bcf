"""Reads single fields of an adapter_config.json: each as what it must be, or a refusal that names it."""

import math
import reprlib
from collections.abc import Mapping

from manylora.adapters.errors import InvalidAdapter

CONFIG_FILE = "adapter_config.json"
_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 3, 120, 120


def shown(value: object) -> str:
    """Return what a config says, as far as a message has room for it."""
    return _BRIEF.repr(value)


def malformed(key: str, what: str) -> InvalidAdapter:
    """Return the refusal of a field that isn't what it must be."""
    return InvalidAdapter(f"{key} {what}", file=CONFIG_FILE)


def rank(value: object, key: str) -> int:
    """Return a rank. Raises InvalidAdapter for what is none, as all of these do."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise malformed(key, f"is {shown(value)}; a rank is an integer from 1 up")
    return value


def number(value: object, key: str) -> float:
    """Return a finite number."""
    try:
        found = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer that no float holds
        found = math.inf
    if not math.isfinite(found):
        raise malformed(key, f"is {shown(value)}; expected a finite number")
    return found


def flag(config: Mapping[str, object], key: str) -> bool:
    """Return true or false; false where nothing is said."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise malformed(key, f"is {shown(value)}; expected true or false")
    return bool(value)


def optional_text(config: Mapping[str, object], key: str) -> str | None:
    """Return a string, if there is one."""
    value = config.get(key)
    if value is not None and not isinstance(value, str):
        raise malformed(key, f"is {shown(value)}; expected a string")
    return value


def texts(value: object, key: str) -> tuple[str, ...]:
    """Return a list of strings that aren't empty."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) and item for item in value):
        raise malformed(key, f"is {shown(value)}; expected a list of names")
    return tuple(value)


def targets(value: object, key: str) -> str | tuple[str, ...]:
    """Return a pattern, or a list of names; () where nothing is said."""
    if value is None:
        return ()
    if isinstance(value, str):
        return value
    return texts(value, key)


def patterns(config: Mapping[str, object], key: str) -> Mapping[str, object]:
    """Return what patterns are given: a JSON object, whose values are yet to be read."""
    value = config.get(key) or {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise malformed(key, f"is {shown(value)}; expected an object")
    return value


def layers(value: object) -> tuple[int, ...]:
    """Return the numbers of layers; () where nothing is said."""
    numbers = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in numbers):
        raise malformed("layers_to_transform", f"is {shown(value)}; expected layer numbers from 0 up")
    return tuple(numbers)


def layer_names(value: object) -> tuple[str, ...]:
    """Return what lists of layers are called."""
    return texts([value] if isinstance(value, str) and value else value or (), "layers_pattern")
