"""From what a client calls a source to a directory that may be read. Serves the local disk only."""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from manylora.adapters.errors import AdapterNotFound, AdapterPathForbidden, InvalidAdapter, UnsupportedAdapter
from manylora.adapters.files import KNOWN_FILES

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")


def resolve_source(src: str, root: Path) -> Path:
    """Return the directory that ``src`` names: a path (from ``root`` if relative) or a file:// URL.

    Links and ``..`` are followed first; the result, and every file that would be read, must lie inside
    ``root``. Raises UnsupportedAdapter for other kinds of source, AdapterPathForbidden, AdapterNotFound.
    """
    inside = root.resolve()
    directory = _follow(inside / _local_path(src), src)
    _check_inside(directory, inside, src)
    if not _is_directory(directory):
        raise AdapterNotFound(
            f"{src!r} is not a directory under the adapter root; give one on the server's disk"
            " (adapters are not downloaded from a model hub)"
        )
    for name in KNOWN_FILES:
        _check_inside(_follow(directory / name, src), inside, f"{src}/{name}")
    return directory


def _local_path(src: str) -> Path:
    if not src or "\0" in src:
        raise InvalidAdapter("the source is empty or holds a NUL character; expected a directory")
    scheme = _SCHEME.match(src)
    if scheme is None:
        return Path(src)
    if scheme[1].lower() != "file":
        raise UnsupportedAdapter(f"{scheme[1]}:// sources are not served; give a path or a file:// URL")
    try:
        url = urlsplit(src)
    except ValueError as error:
        raise InvalidAdapter(f"{src!r} is no URL: {error}") from None
    if url.netloc not in ("", "localhost") or url.query or url.fragment or not url.path:
        raise InvalidAdapter(f"{src!r}: a file URL looks like file:///path/to/adapter")
    path = unquote(url.path)
    if "\0" in path:
        raise InvalidAdapter("the source holds a NUL character; expected a directory")
    return Path(path)


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _follow(path: Path, src: str) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise AdapterNotFound(f"{src!r} can't be followed: {error}") from error


def _check_inside(path: Path, root: Path, src: str) -> None:
    # Before any look at the disk: what lies outside must not be told apart from what isn't there.
    if not path.is_relative_to(root):
        raise AdapterPathForbidden(f"{src!r} leads out of the directory that adapters may be read from")
