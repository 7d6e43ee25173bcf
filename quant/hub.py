"""Where a model's files are: in a directory, or in the hub's cache after a download."""

import os
from pathlib import Path

from manylora.quant.errors import CheckpointMissing

FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
"""What a base needs. Pickled weights and code are not among it."""
CODE = "*.py"


def find_checkpoint(
    name: str, *, revision: str | None = None, cache_dir: str | None = None, with_code: bool = False
) -> Path:
    """Return the directory of a model: itself, or downloaded from the hub under OWNER/MODEL.

    ``with_code`` downloads the model's Python files too. Raises CheckpointMissing with what to do.
    """
    path = Path(os.path.expanduser(name))  # Path's own raises for a user that there isn't
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointMissing(f"{name} is a file; a model is a directory with config.json and safetensors")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise CheckpointMissing(f"{name}: there is no such directory, and a hub name is OWNER/MODEL")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*FILES, CODE] if with_code else list(FILES)
    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointMissing(
            f"{name} can't be had from the hub ({first}); download it elsewhere and give its directory"
        ) from None
