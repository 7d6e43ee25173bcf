"""Where each setting's value comes from: flag, environment or file, in this order. Bad ones are told by that name."""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from manylora.server.config import ENV_PREFIX, ServeSettings

CONFIG_VARIABLE = f"{ENV_PREFIX}CONFIG"
OTHER_VARIABLES = frozenset(
    {CONFIG_VARIABLE, f"{ENV_PREFIX}URL", f"{ENV_PREFIX}SOURCE_TOKEN", f"{ENV_PREFIX}BENCH_API_KEY"}
)
"""Variables that other commands read."""
KUBERNETES = re.compile(rf"{ENV_PREFIX}(SERVICE_(HOST|PORT)(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")
"""What Kubernetes tells every pod beside a Service named manylora. Nobody's typing mistake."""
SECRET = frozenset({"api_key", "admin_key"})

FileValues = Mapping[str, Any]


class SettingsError(ValueError):
    """A setting has no name or no sense. One line: where it was given, and what was expected."""


def load_settings(flags: Mapping[str, Any], config_file: Path | None = None) -> ServeSettings:
    """Merge flags, environment and config file into checked settings. Raises SettingsError."""
    file_values = {} if config_file is None else _read_config(config_file)
    environment = _read_environment()
    names = {
        **{key: f"{key} in {config_file}" for key in file_values},
        **{key: variable for key, (variable, _) in environment.items()},
        **{key: _flag(key) for key in flags},
    }
    values = {**file_values, **{key: value for key, (_, value) in environment.items()}, **flags}
    try:
        return ServeSettings(**values).named_by(names)
    except ValidationError as error:
        raise SettingsError(_one_line(error, names)) from None


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _read_environment() -> dict[str, tuple[str, str]]:
    """Return the variable and its text for each setting that the environment has; empty ones are none."""
    found = {}
    for variable, text in os.environ.items():
        upper = variable.upper()
        if not upper.startswith(ENV_PREFIX) or upper in OTHER_VARIABLES or KUBERNETES.fullmatch(upper):
            continue
        key = upper.removeprefix(ENV_PREFIX).lower()
        if key not in ServeSettings.model_fields:
            known = [ENV_PREFIX + name.upper() for name in ServeSettings.model_fields]
            raise SettingsError(f"{variable}: unknown setting{_nearest(upper, [*known, *OTHER_VARIABLES])}")
        if text:
            found[key] = (variable, text)
    return found


def _read_config(path: Path) -> dict[str, Any]:
    parse = _PARSERS.get(path.suffix)
    if parse is None:
        raise SettingsError(f"--config {path}: use a .toml, .yaml or .json file")
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"--config {path}: no such file") from None
    except OSError as error:
        raise SettingsError(f"--config {path} can't be read: {error.strerror}") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise SettingsError(
            f"--config {path} is not {path.suffix[1:].upper()}: {' '.join(str(error).split())}"
        ) from None
    if values is None:  # an empty YAML file
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"--config {path} holds {type(values).__name__}, not keys and their values")
    return _known(path, values)


def _known(path: Path, values: Mapping[Any, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in ServeSettings.model_fields:
            raise SettingsError(
                f"{key} in {path}: unknown setting{_nearest(name, ServeSettings.model_fields)}"
            )
        if name in found:
            raise SettingsError(f"{key} in {path}: given twice, with - and with _")
        found[name] = value
    return found


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


class _OnceLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which also refuses a key that is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of a node."""
        return _once(
            [
                (self.construct_object(key, deep), self.construct_object(value, deep))
                for key, value in node.value
            ]
        )


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    names = [str(key) for key, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is there twice")
    return dict(pairs)


_PARSERS: Mapping[str, Callable[[str], Any]] = {
    ".toml": tomllib.loads,
    ".json": lambda text: json.loads(text, object_pairs_hook=_once),
    ".yaml": lambda text: yaml.load(text, _OnceLoader),  # a safe loader
    ".yml": lambda text: yaml.load(text, _OnceLoader),
}


def _one_line(error: ValidationError, names: Mapping[str, str]) -> str:
    """Turn pydantic's report into one line that names where each value was given."""
    parts = []
    for item in error.errors():
        key = str(item["loc"][0]) if item["loc"] else ""
        message = item["msg"].removeprefix("Value error, ")
        given = "" if key in SECRET or not key else f" (given: {str(item['input'])[:80]!r})"
        if key == "port" and str(item["input"]).startswith(("tcp://", "udp://")):
            given += ". Kubernetes sets this for a Service named manylora: enableServiceLinks: false in the pod's spec"
        parts.append(f"{names.get(key, 'settings')}: {message}{given}")
    return "; ".join(parts)
