"""What `manylora merge` is given as an adapter: a directory, or a mixture of directories with weights.

``DIR``, ``DIR:0.7+DIR:0.3``, or ``--adapter`` once for each part: ``DIR`` or ``DIR:WEIGHT``. What is a directory as it
stands is that directory, whatever is in its name; else the weight follows the last colon.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from manylora.adapters.config_fields import CONFIG_FILE
from manylora.adapters.errors import InvalidMixture
from manylora.adapters.mixtures import MixturePart, is_mixture, parse_mixture
from manylora.failing import fail

if TYPE_CHECKING:
    from manylora.adapters.export.settings import ExportPart


def read_parts(given: Sequence[str]) -> "Path | tuple[ExportPart, ...]":
    """Return the one directory, or the parts of a mixture. Raises typer.Exit after one line on stderr."""
    if len(given) == 1 and not is_mixture(given[0], _is_directory):
        return _directory(given[0])
    try:
        one = len(given) == 1
        parts = parse_mixture(given[0], _is_directory) if one else tuple(map(_part, given))
    except InvalidMixture as error:
        raise fail(f"--adapter: {error}") from None
    return _named(parts)


def as_parts(adapter: "Path | tuple[ExportPart, ...]") -> "tuple[ExportPart, ...]":
    """Return one adapter as a mixture of itself alone."""
    from manylora.adapters.export.settings import ExportPart

    return (ExportPart(adapter.resolve().name, adapter, 1.0),) if isinstance(adapter, Path) else adapter


def _part(text: str) -> MixturePart:
    """Return one part; a ``+`` in it is the directory's."""
    if _is_directory(text):
        return MixturePart(text, 1.0)
    directory, colon, weight = text.rpartition(":")
    if not colon or not _is_directory(directory):
        return MixturePart(text, 1.0)  # which is no directory, and refused as that
    found = parse_mixture(f"part:{weight}", lambda name: name == "part")
    if found[0].adapter != "part":
        raise InvalidMixture(
            f"{text!r}: a part is DIRECTORY or DIRECTORY:WEIGHT, and {weight!r} is no number"
        )
    return MixturePart(directory, found[0].weight)


def _named(parts: Sequence[MixturePart]) -> "tuple[ExportPart, ...]":
    """Return the parts under their directories' names, or under the paths where two have the same name."""
    from manylora.adapters.export.settings import ExportPart

    directories = [_directory(part.adapter) for part in parts]
    names = [directory.resolve().name for directory in directories]
    unique = names if len(set(names)) == len(names) else [part.adapter for part in parts]
    return tuple(
        ExportPart(name, directory, part.weight)
        for name, directory, part in zip(unique, directories, parts, strict=True)
    )


def _directory(text: str) -> Path:
    directory = _expanded(text)
    if not directory.is_dir():
        raise fail(f"--adapter {text}: there is no such directory")
    if not (directory / CONFIG_FILE).is_file():
        raise fail(
            f"--adapter {text} holds no adapter (there is no {CONFIG_FILE}){_checkpoint_in(directory)}"
        )
    return directory


def _checkpoint_in(directory: Path) -> str:
    """Say where in a run's directory there is an adapter, of a run that didn't come to its end."""
    found = sorted(
        directory.glob(f"checkpoint-*/{CONFIG_FILE}"), key=lambda path: (len(path.parent.name), path)
    )
    return f"; its last checkpoint is one: {found[-1].parent}" if found else ""


def _is_directory(text: str) -> bool:
    return bool(text) and _expanded(text).is_dir()


def _expanded(text: str) -> Path:
    return Path(os.path.expanduser(text))  # never raises
