"""A base's tokenizer for training: read as everybody reads it (adapters/tokenizer.py), padding on the right."""

from pathlib import Path
from typing import Any

from manylora.adapters import tokenizer as folders
from manylora.adapters.tokenizer import TokenizerRefused
from manylora.training.errors import BaseRefused


def load_tokenizer(
    directory: Path, *, model_max_length: int | None = None, trust_remote_code: bool = False
) -> Any:
    """Return the tokenizer in ``directory``, padding on the right, with a pad token. Raises BaseRefused."""
    options = {} if model_max_length is None else {"model_max_length": model_max_length}
    try:
        tokenizer: Any = folders.load_tokenizer(
            directory, padding_side="right", trust_remote_code=trust_remote_code, **options
        )
    except TokenizerRefused as error:
        raise BaseRefused(str(error)) from None
    if tokenizer.eos_token is None and tokenizer.pad_token is None:
        raise BaseRefused(
            f"{directory}: the tokenizer names neither an end nor a pad token; set eos_token in "
            "tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        # Padding is masked by its place, never by its id, so that an end token that was trained stays trained.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
