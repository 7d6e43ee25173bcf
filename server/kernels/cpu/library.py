"""Loads ``_kernels.so``, says which of its levels this processor runs, and opens one with a pool of threads.

A library that isn't there, is another's (ABI, sources) or holds no level for this processor is a reason in words, not
an error: the plain backend serves then.
"""

import ctypes
import weakref
from dataclasses import dataclass
from pathlib import Path

from manylora.server.kernels.cpu import abi
from manylora.server.kernels.cpu.build import HERE, LIBRARY, NATIVE, sources_digest
from manylora.server.kernels.cpu.cores import find_cores

COMPILE = "python -m manylora.server.kernels.cpu.build"
MOST_THREADS = 1024


class KernelsRefused(ValueError):
    """A level was asked for by name, and can't be had. One line."""


@dataclass(frozen=True, slots=True)
class Unavailable:
    """There are no native kernels here."""

    reason: str


@dataclass(frozen=True, slots=True)
class Level:
    """A level that the library holds."""

    name: str
    lacks: str | None
    """What this processor lacks for it; None: it runs."""
    exports: dict[str, int]
    """Addresses of its functions."""


@dataclass(frozen=True, slots=True)
class Library:
    """A loaded library that fits this package."""

    handle: ctypes.CDLL
    levels: tuple[Level, ...]
    """The fastest first."""

    @property
    def runs(self) -> tuple[str, ...]:
        """The levels that this processor has."""
        return tuple(level.name for level in self.levels if level.lacks is None)


class Kernels:
    """A level's functions and the threads that they run on. Calls let other Python threads run meanwhile."""

    def __init__(self, library: Library, level: Level, threads: int) -> None:
        self.level = level.name
        self.threads = threads
        held = find_cores().held(threads)
        cores = (ctypes.c_int32 * threads)(*held) if held else None
        create, destroy = library.handle.ml_pool_create, library.handle.ml_pool_destroy
        create.restype, create.argtypes = ctypes.c_void_p, (ctypes.c_int32, ctypes.c_void_p)
        destroy.restype, destroy.argtypes = None, (ctypes.c_void_p,)
        self._pool = create(threads, cores)
        if not self._pool:
            raise MemoryError(f"no memory for a pool of {threads} threads")
        # Not at exit: threads that nobody waits for may be in the middle of a step.
        weakref.finalize(self, destroy, self._pool).atexit = False
        self._functions = {
            name: ctypes.CFUNCTYPE(returns, ctypes.c_void_p, *takes)(level.exports[name])
            for name, (returns, takes) in abi.SIGNATURES.items()
        }

    def call(self, name: str, *arguments: int | float | ctypes.Structure | None) -> int:
        """Run one of abi.SIGNATURES on the pool; return what it returns, 0 for nothing."""
        result: int | None = self._functions[name](self._pool, *arguments)
        return result or 0


def open_kernels(
    level: str | None = None, threads: int | None = None, path: Path = HERE / LIBRARY
) -> Kernels | Unavailable:
    """Open a level, by default the fastest that this processor has, with so many threads, by default one a core.

    Raises KernelsRefused when a level is named that can't be had.
    """
    library = load_library(path)
    if isinstance(library, Unavailable):
        if level:
            raise KernelsRefused(f"{level}: {library.reason}")
        return library
    chosen = _chosen(library, level)
    if isinstance(chosen, Unavailable):
        return chosen
    count = threads or find_cores().threads
    if not 1 <= count <= MOST_THREADS:
        raise KernelsRefused(f"{count} threads: give 1 to {MOST_THREADS}")
    return Kernels(library, chosen, count)


def _chosen(library: Library, wanted: str | None) -> Level | Unavailable:
    if wanted is None:
        found = next((level for level in library.levels if level.lacks is None), None)
        lacking = "; ".join(f"{level.name} needs {level.lacks}" for level in library.levels)
        return found or Unavailable(f"this processor runs none of the levels that were compiled ({lacking})")
    by_name = {level.name: level for level in library.levels}
    if wanted not in by_name:
        raise KernelsRefused(f"{wanted}: not compiled here; there are {', '.join(by_name)} and plain")
    level = by_name[wanted]
    if level.lacks:
        runs = ", ".join((*library.runs, "plain"))
        raise KernelsRefused(f"{wanted}: this processor has no {level.lacks}; it runs {runs}")
    return level


def load_library(path: Path = HERE / LIBRARY) -> Library | Unavailable:
    """Load the library, if it is there and fits."""
    if not path.exists():
        return Unavailable(f"they weren't compiled; install g++ or clang++ and run `{COMPILE}`")
    try:
        handle = ctypes.CDLL(str(path))
        version = handle.ml_abi()
        handle.ml_sources.restype = ctypes.c_char_p
        sources = handle.ml_sources().decode()
    except (OSError, AttributeError) as error:
        return Unavailable(f"{path} can't be loaded ({error}); run `{COMPILE}`")
    if version != abi.VERSION:
        return Unavailable(f"{path} has ABI {version}, and {abi.VERSION} is needed; run `{COMPILE}`")
    if NATIVE.is_dir() and sources != sources_digest():
        return Unavailable(f"{path} was compiled from other sources than these; run `{COMPILE}`")
    levels = _levels(handle)
    missing = {
        f"{level.name}.{name}" for level in levels for name in abi.SIGNATURES.keys() - level.exports.keys()
    }
    if missing:
        return Unavailable(f"{path} lacks {', '.join(sorted(missing))}; run `{COMPILE}`")
    return Library(handle, levels)


def _levels(handle: ctypes.CDLL) -> tuple[Level, ...]:
    handle.ml_level_at.restype = ctypes.POINTER(abi.LevelTable)
    handle.ml_level_lacks.restype = ctypes.c_char_p
    levels: list[Level] = []
    while table := handle.ml_level_at(len(levels)):
        lacks: bytes | None = handle.ml_level_lacks(len(levels))
        exports: dict[str, int] = {}
        while (export := table.contents.exports[len(exports)]).name:
            exports[export.name.decode()] = export.call
        levels.append(Level(table.contents.name.decode(), lacks.decode() if lacks else None, exports))
    return tuple(levels)


def layouts(library: Library) -> dict[str, int]:
    """Return the sizes and offsets of abi.h's structures as the compiler has them; see abi.layouts."""
    library.handle.ml_layouts.restype = ctypes.POINTER(abi.Layout)
    table = library.handle.ml_layouts()
    said: dict[str, int] = {}
    while (entry := table[len(said)]).name:
        said[entry.name.decode()] = entry.bytes
    return said
