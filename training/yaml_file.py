"""YAML files of keys, by YAML 1.2's core schema: what is written as a number or a word is read as one.

PyYAML follows YAML 1.1, in which 1e-5 is text, `no` is false and 8:0 is 480; and it keeps the last of two equal keys.
"""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from manylora.training.errors import InvalidArgument, reason_of

_TAG = "tag:yaml.org,2002:"
_CORE = (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)
"""Tag, what it looks like, and what it begins with; an integer is looked for before a float."""


class _Loader(yaml.SafeLoader):
    """A SafeLoader of the core schema without the right to give a key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = next((key for at, key in enumerate(keys) if key in keys[:at]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                problem=f"{twice!r} is given twice", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep=deep)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text, base)


_Loader.yaml_implicit_resolvers = {}
for _name, _pattern, _first in _CORE:
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor(f"{_TAG}int", _integer)


def read_keys(path: Path, flag: str) -> dict[str, Any]:
    """Return the keys and values of a YAML file that ``flag`` names. Raises InvalidArgument."""
    try:
        content = yaml.load(path.read_text(), _Loader)  # a SafeLoader
    except RecursionError:
        raise InvalidArgument(f"{flag} {path} can't be read: it is nested too deeply") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidArgument(f"{flag} {path} can't be read: {reason_of(error)}") from None
    if not isinstance(content, dict):
        raise InvalidArgument(f"{flag} {path}: expected keys and values, as in `learning_rate: 3e-4`")
    return {str(key): value for key, value in content.items()}
