"""What an adapter_config.json says of embedding and head: which are saved whole, which tokens' rows were trained."""

from collections.abc import Mapping

from manylora.adapters.config_fields import CONFIG_FILE, malformed, shown
from manylora.adapters.errors import UnsupportedAdapter
from manylora.adapters.vocabulary import EMBEDDING, TOKEN_MODULES

SAVED, TRAINED = "modules_to_save", "trainable_token_indices"


def read_saved_modules(config: Mapping[str, object]) -> frozenset[str]:
    """Return which of TOKEN_MODULES ``modules_to_save`` names. Raises UnsupportedAdapter for any other module."""
    value = config.get(SAVED)
    if not value:
        return frozenset()
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise malformed(SAVED, f"is {shown(value)}; expected a list of names")
    return frozenset(_module(name, SAVED) for name in value)


def read_trained_tokens(config: Mapping[str, object]) -> Mapping[str, tuple[int, ...]]:
    """Return the ids of ``trainable_token_indices`` by one of TOKEN_MODULES; a list is the embedding's (peft 0.21)."""
    value = config.get(TRAINED)
    if value is None:
        return {}
    by_name = value if isinstance(value, dict) else {EMBEDDING: value}
    found: dict[str, tuple[int, ...]] = {}
    for name, ids in by_name.items():
        path = _module(name, TRAINED)
        if path in found:
            raise malformed(TRAINED, f"names {path} twice")
        found[path] = _ids(ids)
    return {path: ids for path, ids in found.items() if ids}


def _module(name: str, field: str) -> str:
    """Return the module that a name means: peft finds modules by the end of their paths."""
    for path in TOKEN_MODULES:
        if name == path or name == path.rpartition(".")[2]:
            return path
    raise UnsupportedAdapter(
        f"{field} names {shown(name)}: beside factors, {' and '.join(TOKEN_MODULES)} alone are served",
        file=CONFIG_FILE,
    )


def _ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or not all(type(each) is int and each >= 0 for each in value):
        raise malformed(
            TRAINED, f"is {shown(value)}; expected token ids from 0 up, or such a list for each module"
        )
    if len(set(value)) < len(value):
        twice = next(each for place, each in enumerate(value) if each in value[:place])
        raise malformed(TRAINED, f"names the token id {twice} twice")
    return tuple(value)
