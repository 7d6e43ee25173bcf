"""A folder into a repository of a model hub, by the hub's own client. The token is passed on and never said."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from manylora.adapters.config_fields import CONFIG_FILE
from manylora.adapters.errors import AdapterError
from manylora.adapters.files import read_json_object

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CARD = "README.md"
MODELS = ("config.json", "*.gguf")
"""By which a folder that holds no adapter is known to hold something to push."""


class HubRefused(Exception):
    """Why nothing was pushed, in one line."""


@dataclass(frozen=True, slots=True)
class Repository:
    """Where to."""

    name: str
    """org/name"""
    revision: str | None
    """A branch; None: main."""
    public: bool


def push_folder(folder: Path, where: Repository, message: str, token: str | None) -> str:
    """Push an adapter's files, or a model's, as one commit; return its address. Raises HubRefused.

    The repository is made if it isn't there, private unless ``where`` says otherwise. One that is there and public is
    left alone then.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils.tqdm import disable_progress_bars

    contents: dict[str, Path | bytes] = {name: folder / name for name in _files(folder)}
    if CARD not in contents and CONFIG_FILE in contents:
        contents[CARD] = _card(folder, where).encode()
    unreachable: tuple[type[BaseException], ...] = (*HfHubHTTPError.__bases__, RuntimeError)
    """Which HTTP library the hub's client has is its own affair."""
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    try:
        _make_ready(api, where)
        added = [CommitOperationAdd(name, content) for name, content in sorted(contents.items())]
        done = api.create_commit(where.name, added, commit_message=message, revision=where.revision)
    except HfHubHTTPError as error:
        raise HubRefused(f"the hub refused it: {_first_line(error.server_message or str(error))}") from None
    except (HFValidationError, LocalTokenNotFoundError, ValueError) as error:
        raise HubRefused(f"{where.name}: {_first_line(str(error))}") from None
    except unreachable as error:
        raise HubRefused(f"the hub at {api.endpoint} can't be reached: {_first_line(str(error))}") from None
    return str(done.commit_url)


def _make_ready(api: "HfApi", where: Repository) -> None:
    api.create_repo(where.name, private=not where.public, exist_ok=True)
    if not where.public and api.model_info(where.name).private is False:
        raise HubRefused(
            f"{where.name} is there and everybody may read it: say --public to push into it all the same"
        )
    if where.revision is not None:
        api.create_branch(where.name, branch=where.revision, exist_ok=True)


def _files(folder: Path) -> list[str]:
    """Return the names of an adapter's files, or of all of a model's. Raises HubRefused for what is neither."""
    from manylora.adapters.export.archive import archived_files

    if (folder / CONFIG_FILE).is_file():
        return list(archived_files(folder))
    if not any(next(folder.glob(pattern), None) for pattern in MODELS):
        raise HubRefused(f"{folder} holds neither an adapter nor a model")
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return [str(name) for name in names if not any(part.startswith(".") for part in name.parts)]


def _card(folder: Path, where: Repository) -> str:
    """Return a model card with the front matter that hubs read."""
    try:
        config = read_json_object(folder / CONFIG_FILE)
    except (AdapterError, OSError) as error:
        raise HubRefused(f"{folder / CONFIG_FILE}: {error}") from None
    base = config.get("base_model_name_or_path")
    named = f"base_model: {json.dumps(base)}\nbase_model_relation: adapter\n" if base else ""
    name = where.name.rsplit("/", 1)[-1]
    return f"""---
{named}library_name: peft
tags:
- lora
---

# {name}

A LoRA adapter of rank {config.get("r")}{f" for **{base}**" if base else ""}, in PEFT's format.

`manylora serve BASE --adapter {name}=DIRECTORY` serves it, and peft's `PeftModel.from_pretrained` loads it.
"""


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else "it doesn't say why"
