"""Which files make an adapter, how large they may be, and the digest of their contents. Not their meaning."""

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from manylora.adapters.errors import AdapterNotFound, InvalidAdapter, UnsupportedAdapter

TOKENIZER_JSON = "tokenizer.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BASE_FILE = "manylora_base.json"
"""How the base was held while the adapter was trained: adapters/base_form.py reads it."""
MANIFEST_FILE = "manylora_adapter.json"
"""What the adapter says of itself: adapters/manifest.py reads it."""
MODULES_FILE, POOLING_FILE = "modules.json", "1_Pooling/config.json"
"""sentence-transformers': adapters/pooling.py reads them."""
KNOWN_FILES = (
    "adapter_config.json",
    WEIGHTS_FILE,
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer_config.json",
    "special_tokens_map.json",
    TOKENIZER_JSON,
    BASE_FILE,
    MODULES_FILE,
    POOLING_FILE,
    MANIFEST_FILE,
)
"""In the order in which the digest takes them. The first two are required."""
OPTIONAL_FILES = frozenset(KNOWN_FILES[2:])
MAX_TEXT_BYTES = 16 << 20
"""Limit of each file but the weights and those below."""
_LIMITS = {
    "adapter_config.json": 1 << 20,
    "added_tokens.json": 1 << 20,
    "chat_template.jinja": 1 << 20,
    "tokenizer_config.json": 4 << 20,  # a vocabulary's thousands of unused tokens take one
    "special_tokens_map.json": 1 << 20,
    TOKENIZER_JSON: 64 << 20,
    BASE_FILE: 1 << 16,
    MODULES_FILE: 1 << 16,
    POOLING_FILE: 1 << 16,
    MANIFEST_FILE: 1 << 20,  # 32 examples of 2,000 characters, each escaped as a pair at worst
}
"""JSON takes some thirty times its size in memory, and the interpreter's lock while it is parsed. tokenizer.json is
parsed in another process; it has about 35 MB for a vocabulary of 256,000 tokens."""
MAX_DIGITS = 308
"""Digits of an integer in JSON: what a float holds. transformers writes 10³⁰ where a tokenizer has no length."""
PICKLED = "adapter_model.bin"
_CHUNK = 1 << 20
_HALF_A_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")
"""Where to look closer: Python reads such an escape alone, and nothing can write it again."""
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# Without O_NONBLOCK a pipe in a file's place would block this thread for ever.
READING = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

Fingerprint = tuple[tuple[str, int, int, int, int, int], ...]
Opener = Callable[[str], int | None]
"""Opens a file of the adapter by its name and returns the descriptor; None if there is no such file."""


class AdapterFiles:
    """The known files of an adapter, held open: what was checked is what is read, whatever their names come to mean.

    Use it in ``with``.
    """

    def __init__(self, opener: Opener, max_bytes: int) -> None:
        """Open what is there and check it, before anything is read.

        Raises AdapterNotFound without an adapter_config.json, UnsupportedAdapter for pickled weights,
        InvalidAdapter for missing weights, anything that is no plain file, or sizes over the limits.
        """
        self._handles: dict[str, int] = {}
        self._stats: dict[str, os.stat_result] = {}
        try:
            for name in KNOWN_FILES:
                self._open(opener, name)
            self._check(opener, max_bytes)
        except BaseException:
            self.close()
            raise

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file that is there."""
        return {name: found.st_size for name, found in self._stats.items()}

    @property
    def fingerprint(self) -> Fingerprint:
        """What tells quickly whether the files changed: where each is, its size and times of change."""
        return tuple(
            (name, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            for name, found in self._stats.items()
        )

    def read_through(self, sink_of: Callable[[str], Callable[[bytes], object]]) -> str:
        """Pass each file's chunks to ``sink_of(name)``; return the sha256 over names, sizes and contents.

        Once only. Raises InvalidAdapter if a file turns out longer or shorter than it was: it is being written to.
        """
        digest = hashlib.sha256()
        for name, size in self.sizes.items():
            digest.update(f"{name}\0{size}\0".encode())
            sink = sink_of(name)
            left = size
            while chunk := _read(self._handles[name], min(_CHUNK, left + 1), name):
                left -= len(chunk)
                if left < 0:
                    break
                digest.update(chunk)
                sink(chunk)
            if left:
                raise InvalidAdapter("changed while it was read; try again when it is complete", file=name)
        return digest.hexdigest()

    def close(self) -> None:
        """Close all files."""
        while self._handles:
            os.close(self._handles.popitem()[1])

    def __enter__(self) -> "AdapterFiles":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, opener: Opener, name: str) -> None:
        handle = opener(name)
        if handle is None:
            return
        self._handles[name] = handle
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise InvalidAdapter("is not a plain file", file=name)
        self._stats[name] = found

    def _check(self, opener: Opener, max_bytes: int) -> None:
        check_sizes(self.sizes, lambda: _has_pickled(opener), max_bytes)
        for name in self.sizes:
            if os.pread(self._handles[name], len(_LFS_POINTER), 0) == _LFS_POINTER:
                raise InvalidAdapter(
                    "is a Git LFS pointer, not the file that it stands for; run `git lfs pull` where it was cloned,"
                    " or download the adapter with a tool that follows such pointers",
                    file=name,
                )


def check_sizes(sizes: Mapping[str, int], has_pickled: Callable[[], bool], max_bytes: int) -> None:
    """Raise as AdapterFiles does for files of these names and sizes; ``has_pickled`` looks for pickled weights."""
    if KNOWN_FILES[0] not in sizes:
        raise AdapterNotFound("there is no adapter_config.json; a PEFT adapter is a directory with one")
    if WEIGHTS_FILE not in sizes:
        if has_pickled():
            raise pickled_weights()
        raise InvalidAdapter("the file is missing", file=WEIGHTS_FILE)
    for name, size in sizes.items():
        limit = most_bytes(name, max_bytes)
        if name != WEIGHTS_FILE and size > limit:
            raise InvalidAdapter(f"{size} bytes; at most {limit}", file=name)
    if sum(sizes.values()) > max_bytes:
        raise InvalidAdapter(f"the files have {sum(sizes.values())} bytes together; at most {max_bytes}")


def most_bytes(name: str, max_bytes: int) -> int:
    """Return how large a known file may be, of ``max_bytes`` for all."""
    return max_bytes if name == WEIGHTS_FILE else _LIMITS.get(name, MAX_TEXT_BYTES)


def open_directory(directory: Path, max_bytes: int) -> AdapterFiles:
    """Open the adapter in ``directory``, following whatever links lead to its files."""

    def opener(name: str) -> int | None:
        try:
            return os.open(directory / name, READING)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise unreadable(error, name) from error

    return AdapterFiles(opener, max_bytes)


def present_files(directory: Path, max_bytes: int) -> dict[str, int]:
    """Return the known files of ``directory`` with their sizes. Raises what AdapterFiles raises."""
    with open_directory(directory, max_bytes) as files:
        return files.sizes


def digest_of(directory: Path, max_bytes: int) -> str:
    """Return the sha256 over names, sizes and contents of the known files; reads them once."""
    with open_directory(directory, max_bytes) as files:
        return files.read_through(lambda name: lambda chunk: None)


def unreadable(error: OSError, name: str) -> InvalidAdapter:
    """Return the error for a file that is there and can't be read."""
    folder, _, _ = name.rpartition("/")
    if folder and error.errno == errno.ENOTDIR:
        return no_folder(folder)
    return InvalidAdapter(f"can't be read: {error.strerror}", file=name)


def no_folder(name: str) -> InvalidAdapter:
    """Return the error for a plain file where a folder is looked into."""
    return InvalidAdapter(
        "is not a folder, and files are looked for in it: make it one or take it away", file=name
    )


def _has_pickled(opener: Opener) -> bool:
    handle = opener(PICKLED)
    if handle is not None:
        os.close(handle)
    return handle is not None


def pickled_weights() -> UnsupportedAdapter:
    """Return the error for weights in pickle."""
    return UnsupportedAdapter(
        "pickle can run code when it is read, so only safetensors are; save the adapter with"
        " safe_serialization=True",
        file=PICKLED,
    )


def _read(handle: int, nbytes: int, name: str) -> bytes:
    try:
        return os.read(handle, nbytes)
    except OSError as error:
        raise unreadable(error, name) from error


def read_json_object(path: Path) -> dict[str, object]:
    """Return the JSON object in a file of limited size. Raises InvalidAdapter naming the file."""
    with path.open("rb") as file:
        raw = file.read(MAX_TEXT_BYTES + 1)
    return parse_json_object(raw, path.name)


def parse_json_object(raw: bytes, file: str) -> dict[str, object]:
    """Return the JSON object in ``raw``, whose texts are all UTF-8. Raises InvalidAdapter naming ``file``."""
    value = parse_json(raw, file)
    if not isinstance(value, dict):
        raise InvalidAdapter("is not a JSON object", file=file)
    return value


def parse_json(raw: bytes, file: str) -> object:
    """Return the JSON in ``raw``, whose texts are all UTF-8. Raises InvalidAdapter naming ``file``."""
    try:
        value: object = json.loads(raw.decode("utf-8-sig"), parse_int=_integer)
        if _HALF_A_PAIR.search(raw):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InvalidAdapter("holds half a surrogate pair, which is no character", file=file) from error
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"is not JSON: {error}", file=file) from error
    return value


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits; at most {MAX_DIGITS}")
    return int(digits)
