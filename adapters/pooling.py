"""How vectors of texts are made with an adapter or a base: what sentence-transformers writes beside it.

``1_Pooling/config.json`` says what becomes of the states of a text's tokens, ``modules.json`` what else is done
(https://sbert.net/docs/package_reference/sentence_transformer/models.html). What isn't done here is refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from manylora.adapters.errors import InvalidAdapter, UnsupportedAdapter
from manylora.adapters.files import MODULES_FILE, POOLING_FILE, parse_json, parse_json_object

Way = Literal["last", "mean"]
_WAYS: dict[str, Way] = {"lasttoken": "last", "mean": "mean"}
_DONE = frozenset({"Transformer", "Pooling", "Normalize"})
"""Modules: a vector is normalised unless a request says otherwise."""
_FLAG, _FLAGS = "pooling_mode", "pooling_mode_"


def read_pooling(directory: Path) -> Way | None:
    """Return how texts are pooled, as the files in ``directory`` say; None: they don't.

    Raises InvalidAdapter, and UnsupportedAdapter for a way that isn't served, naming it.
    """
    told = directory / MODULES_FILE
    if told.is_file():
        _check_modules(parse_json(told.read_bytes(), MODULES_FILE))
    config = directory / POOLING_FILE
    if not config.is_file():
        return None
    return _way(parse_json_object(config.read_bytes(), POOLING_FILE))


def _way(config: Mapping[str, object]) -> Way:
    asked = _asked(config)
    if not asked:
        raise InvalidAdapter("it sets no pooling_mode", file=POOLING_FILE)
    if len(asked) > 1 or asked[0] not in _WAYS:
        raise UnsupportedAdapter(
            f"texts are pooled by {' and '.join(asked)}: served are mean and lasttoken, one of them",
            file=POOLING_FILE,
        )
    if config.get("include_prompt", True) is False:
        raise UnsupportedAdapter(
            "include_prompt is false: a text's prompt is part of it here, and pooled with it",
            file=POOLING_FILE,
        )
    return _WAYS[asked[0]]


def _asked(config: Mapping[str, object]) -> list[str]:
    """Return the ways that a config names, in either of its two forms, by sentence-transformers' short names."""
    named = config.get(_FLAG)
    if isinstance(named, str):
        return named.split("+")
    if isinstance(named, list):
        return [str(each) for each in named]
    flags = [name.removeprefix(_FLAGS) for name, value in config.items() if name.startswith(_FLAGS) and value]
    return [name.removesuffix("_tokens").removesuffix("_token") for name in flags]


def _check_modules(modules: object) -> None:
    if not isinstance(modules, list) or not all(isinstance(each, dict) for each in modules):
        raise InvalidAdapter("is not a list of modules", file=MODULES_FILE)
    for each in modules:
        kind, path = str(each.get("type", "")).rpartition(".")[2], each.get("path")
        if kind not in _DONE:
            raise UnsupportedAdapter(
                f"a vector goes through a module {json.dumps(kind)[:100]}: done are {', '.join(sorted(_DONE))}",
                file=MODULES_FILE,
            )
        if kind == "Pooling" and path != POOLING_FILE.partition("/")[0]:
            raise UnsupportedAdapter(
                f"the module Pooling is in {json.dumps(path)[:100]}: it is looked for in {POOLING_FILE}",
                file=MODULES_FILE,
            )
