"""A base's tokenizer, read as the server reads it: a token more or less would train another text than is served."""

import json
from pathlib import Path
from typing import Any

from manylora.training.errors import BaseRefused

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Names in tokenizer_config.json that say that tokenizer.json is all there is. AutoTokenizer overrules them for some
families: it would give every qwen2 Qwen's own way of splitting words. server/tokenizer.py has the same rule."""


def load_tokenizer(
    directory: Path, *, model_max_length: int | None = None, trust_remote_code: bool = False
) -> Any:
    """Return the tokenizer in ``directory``, padding on the right, with a pad token. Raises BaseRefused."""
    if not has_tokenizer(directory) and not trust_remote_code:
        # transformers would make an empty one.
        raise BaseRefused(f"{directory} has no tokenizer: one of {', '.join(TOKENIZER_FILES)} must be there")
    options = {} if model_max_length is None else {"model_max_length": model_max_length}
    try:
        tokenizer = _class_for(directory).from_pretrained(
            directory,
            padding_side="right",
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            **options,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BaseRefused(f"{directory}: the tokenizer can't be loaded: {first}") from None
    if tokenizer.eos_token is None and tokenizer.pad_token is None:
        raise BaseRefused(
            f"{directory}: the tokenizer names neither an end nor a pad token; set eos_token in "
            "tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        # Padding is masked by its place, never by its id, so that an end token that was trained stays trained.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def has_tokenizer(directory: Path) -> bool:
    """Whether a tokenizer's vocabulary is there."""
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def _class_for(directory: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    config = directory / "tokenizer_config.json"
    named = json.loads(config.read_text()).get("tokenizer_class") if config.is_file() else None
    return PreTrainedTokenizerFast if named in GENERIC_CLASSES else AutoTokenizer
