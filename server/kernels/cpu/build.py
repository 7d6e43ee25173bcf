"""Compiles ``native/`` into ``_kernels.so``: what ``pip install`` and ``make`` run where there is a C++17 compiler.

Needs nothing but the standard library, so that setup.py can load it by its path, before anything is installed. Each
instruction set has an object file and flags of its own; one that the compiler doesn't know is left out. Objects are
kept, and made again only when a source, a flag or the compiler has changed.
"""

import argparse
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
NATIVE = HERE / "native"
LIBRARY = "_kernels.so"
COMPILERS = ("c++", "g++", "clang++")
COMMON = (
    *("-O3", "-std=c++17", "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-ffp-contract=off", "-fno-math-errno"),  # a row's bits are the same in every tile
    *("-Wall", "-Wextra"),
)
LINK = ("-shared", "-pthread", "-static-libgcc")


@dataclass(frozen=True, slots=True)
class Level:
    """An instruction set that kernels are compiled for: native/level_<name>.cpp."""

    name: str
    machine: str
    """What the compiler's target begins with."""
    flags: tuple[str, ...]


_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_VNNI = (
    *_AVX2,
    "-mavx512f",
    "-mavx512dq",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512vnni",
    "-mprefer-vector-width=512",
)
_BF16 = (*_VNNI, "-mavx512bf16")
LEVELS = (
    Level("amx", "x86_64", (*_BF16, "-mamx-tile", "-mamx-int8", "-mamx-bf16")),
    Level("avx512_bf16", "x86_64", _BF16),
    Level("avx512_vnni", "x86_64", _VNNI),
    Level("avx2", "x86_64", _AVX2),
    Level("neon", "aarch64", ("-march=armv8.2-a+dotprod",)),
)
"""The fastest first: the first that the processor has is taken."""


class CannotBuild(Exception):
    """There is no compiler, or it can't compile this. One line."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler that runs here."""

    command: tuple[str, ...]
    machine: str
    version: str

    def run(self, arguments: Sequence[str]) -> None:
        """Run it. Raises CannotBuild with what it printed."""
        done = subprocess.run([*self.command, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotBuild(done.stderr.strip() or f"{self.command[0]} ended with {done.returncode}")

    def knows(self, flags: Sequence[str]) -> bool:
        """Whether it takes these flags."""
        try:
            self.run([*flags, "-std=c++17", "-fsyntax-only", "-x", "c++", os.devnull])
        except CannotBuild:
            return False
        return True


@dataclass(frozen=True, slots=True)
class Unit:
    """A file to compile, with what is its own among the flags."""

    source: Path
    flags: tuple[str, ...]


def find_compiler() -> Compiler:
    """Return the compiler that the environment's CXX names, else the first that is installed. Raises CannotBuild."""
    named = os.environ.get("CXX", "").strip()
    for command in [tuple(shlex.split(named))] if named else [(name,) for name in COMPILERS]:
        try:
            asked = [
                subprocess.run([*command, option], capture_output=True, text=True, check=True).stdout.strip()
                for option in ("-dumpmachine", "--version")
            ]
        except (OSError, subprocess.CalledProcessError):
            continue
        machine = asked[0].replace("arm64", "aarch64")
        if machine:
            return Compiler(command, machine, asked[1])
    raise CannotBuild(
        f"CXX={named} is no C++ compiler" if named else "no C++ compiler (g++ or clang++) was found"
    )


def sources_digest(folder: Path = NATIVE) -> str:
    """Return the digest of all sources, which the library that is compiled from them carries."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.h"), *folder.glob("*.cpp")]):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def build(
    output: Path,
    objects: Path,
    *,
    extra: Sequence[str] = (),
    strict: bool = False,
    say: Callable[[str], None] = print,
) -> tuple[str, ...]:
    """Compile and link ``output``; return its levels, the fastest first. Raises CannotBuild.

    ``objects`` keeps the object files; ``extra`` are flags for all. ``strict`` takes warnings for errors, and a level
    that fails is one too instead of being left out.
    """
    compiler = find_compiler()
    objects.mkdir(parents=True, exist_ok=True)
    with _alone(objects):
        return _build(compiler, output, objects, extra, strict, say)


def _build(
    compiler: Compiler,
    output: Path,
    objects: Path,
    extra: Sequence[str],
    strict: bool,
    say: Callable[[str], None],
) -> tuple[str, ...]:
    common = (*COMMON, *extra, *(("-Werror",) if strict else ()))
    fitting = [level for level in LEVELS if compiler.machine.startswith(level.machine)]
    known = [level for level in fitting if compiler.knows(level.flags)]
    for level in set(fitting) - set(known):
        say(f"{compiler.command[0]} doesn't know {level.name}: left out")
    units = [Unit(NATIVE / f"level_{level.name}.cpp", (*common, *level.flags)) for level in known]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        made = list(pool.map(lambda unit: _made(compiler, unit, objects, strict, say), units))
        names = tuple(level.name for level, path in zip(known, made, strict=True) if path)
        if not names:
            raise CannotBuild(f"{compiler.command[0]} compiles no level for {compiler.machine}")
        macros = (
            f"-DML_LEVELS={' '.join(f'X({name})' for name in names)}",
            f'-DML_SOURCES="{sources_digest()}"',
        )
        rest = [Unit(NATIVE / "dispatch.cpp", (*common, *macros)), Unit(NATIVE / "pool.cpp", common)]
        made += pool.map(lambda unit: _object(compiler, unit, objects), rest)
    _link(compiler, [path for path in made if path], output, extra)
    return names


@contextmanager
def _alone(objects: Path) -> Iterator[None]:
    """Let one build at a time have the objects, where the system knows locks."""
    with (objects / "lock").open("w") as lock:
        with suppress(ImportError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _made(
    compiler: Compiler, unit: Unit, objects: Path, strict: bool, say: Callable[[str], None]
) -> Path | None:
    """Return a level's object file, or None where it can't be compiled and needn't."""
    try:
        return _object(compiler, unit, objects)
    except CannotBuild as error:
        if strict:
            raise
        say(f"{unit.source.name} can't be compiled, and is left out: {error}")
        return None


def _object(compiler: Compiler, unit: Unit, objects: Path) -> Path:
    digest = hashlib.sha256(repr((compiler, unit.flags)).encode())
    for path in (unit.source, *sorted(NATIVE.glob("*.h"))):
        digest.update(path.read_bytes())
    target, kept = objects / f"{unit.source.stem}.o", objects / f"{unit.source.stem}.key"
    if target.exists() and kept.exists() and kept.read_text() == digest.hexdigest():
        return target
    kept.unlink(missing_ok=True)
    compiler.run([*unit.flags, "-c", str(unit.source), "-o", str(target)])
    kept.write_text(digest.hexdigest())
    return target


def _link(compiler: Compiler, made: Sequence[Path], output: Path, extra: Sequence[str]) -> None:
    """Put the library in its place whole: a server may be running on the one that is there."""
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        new = Path(folder) / output.name
        compiler.run([*LINK, *extra, *map(str, made), "-o", str(new)])
        if not output.exists() or output.read_bytes() != new.read_bytes():
            new.replace(output)


@contextmanager
def _kept_objects() -> Iterator[Path]:
    """Yield a folder for object files: the checkout's build/, or one that is thrown away."""
    root = HERE.parents[2]
    if (root / "setup.py").exists():
        yield root / "build" / "kernels"
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main() -> int:
    """Compile the library into its place beside this file; return the exit status."""
    parser = argparse.ArgumentParser(description="Compile the native CPU kernels.")
    parser.add_argument("--strict", action="store_true", help="warnings are errors, and no level may fail")
    parser.add_argument("--optional", action="store_true", help="no compiler is no error")
    parser.add_argument("--sanitize", help="address,undefined or thread: compile for that sanitizer")
    parser.add_argument("--output", type=Path, default=HERE / LIBRARY, help="the library")
    options = parser.parse_args()
    extra = (f"-fsanitize={options.sanitize}", "-fno-omit-frame-pointer", "-g") if options.sanitize else ()
    try:
        with _kept_objects() as objects:
            kind = options.sanitize or ("strict" if options.strict else "plain")
            names = build(options.output, objects / kind, extra=extra, strict=options.strict, say=_say)
    except (CannotBuild, OSError) as error:
        _say(f"no native CPU kernels: {error}")
        return 0 if options.optional else 1
    _say(f"native CPU kernels: {', '.join(names)}")
    return 0


def _say(sentence: str) -> None:
    sys.stderr.write(sentence + "\n")


if __name__ == "__main__":
    sys.exit(main())
