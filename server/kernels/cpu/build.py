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
    Level("amx", "x86_64", (*_BF16, "-mamx-tile", "-mamx-int8")),
    Level("avx512_bf16", "x86_64", _BF16),
    Level("avx512_vnni", "x86_64", _VNNI),
    Level("avx2", "x86_64", _AVX2),
    Level("neon", "aarch64", ("-march=armv8.2-a+dotprod",)),
)
"""The fastest first: the first that the processor has is taken."""


class CannotBuild(Exception):
    """There is no compiler, or this is what it said."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler that runs here."""

    command: tuple[str, ...]
    machine: str
    version: str

    def run(self, arguments: Sequence[str]) -> str:
        """Run it; return the warnings that it printed. Raises CannotBuild with the errors."""
        done = subprocess.run([*self.command, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotBuild(done.stderr.strip() or f"{self.command[0]} ended with {done.returncode}")
        return done.stderr.strip()

    def knows(self, flags: Sequence[str]) -> bool:
        """Whether it takes these flags."""
        try:
            self.run([*flags, "-std=c++17", "-fsyntax-only", "-x", "c++", os.devnull])
        except CannotBuild:
            return False
        return True


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


@dataclass(frozen=True, slots=True)
class Build:
    """What is compiled, from what, and how."""

    output: Path
    """The library."""
    objects: Path
    """Where object files are kept."""
    native: Path = NATIVE
    extra: tuple[str, ...] = ()
    """Flags for all files."""
    strict: bool = False
    """Whether warnings are errors, and so is a level that can't be compiled, instead of being left out."""
    say: Callable[[str], None] = print

    def run(self) -> tuple[str, ...]:
        """Compile and link; return the levels, the fastest first. Raises CannotBuild."""
        compiler = find_compiler()
        self.objects.mkdir(parents=True, exist_ok=True)
        with _alone(self.objects):
            names, made = self._levels(compiler)
            macros = (
                f"-DML_LEVELS={' '.join(f'X({name})' for name in names)}",
                f'-DML_SOURCES="{sources_digest(self.native)}"',
            )
            made.append(self._object(compiler, "dispatch", macros))
            made.append(self._object(compiler, "pool", ()))
            self._link(compiler, made)
        return names

    def _levels(self, compiler: Compiler) -> tuple[tuple[str, ...], list[Path]]:
        """Compile what this compiler can for its target; return the names and the object files."""
        fitting = [level for level in LEVELS if compiler.machine.startswith(level.machine)]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            made = list(pool.map(lambda level: self._level(compiler, level), fitting))
        names = tuple(level.name for level, path in zip(fitting, made, strict=True) if path)
        if not names:
            raise CannotBuild(f"{compiler.command[0]} compiles no level for {compiler.machine}")
        return names, [path for path in made if path]

    def _level(self, compiler: Compiler, level: Level) -> Path | None:
        if not compiler.knows(level.flags):
            self.say(f"{compiler.command[0]} doesn't know {level.name}, which is left out")
            return None
        try:
            return self._object(compiler, f"level_{level.name}", level.flags)
        except CannotBuild as error:
            if self.strict:
                raise
            self.say(f"{level.name} can't be compiled, and is left out: {error}")
            return None

    def _object(self, compiler: Compiler, name: str, own: Sequence[str]) -> Path:
        """Compile a source unless nothing has changed since; its warnings are kept beside it."""
        source, flags = self.native / f"{name}.cpp", [*COMMON, *self.extra, *own]
        digest = hashlib.sha256(repr((compiler, flags)).encode())
        for path in (source, *sorted(self.native.glob("*.h"))):
            digest.update(path.read_bytes())
        target, key = self.objects / f"{name}.o", self.objects / f"{name}.key"
        kept, _, warnings = key.read_text().partition("\n") if key.exists() else ("", "", "")
        if kept != digest.hexdigest() or not target.exists():
            key.unlink(missing_ok=True)
            warnings = compiler.run([*flags, "-c", str(source), "-o", str(target)])
            key.write_text(f"{digest.hexdigest()}\n{warnings}")
        if warnings and self.strict:
            raise CannotBuild(warnings)
        return target

    def _link(self, compiler: Compiler, made: Sequence[Path]) -> None:
        """Put the library in its place whole: a server may be running on the one that is there."""
        with tempfile.TemporaryDirectory(dir=self.output.parent) as folder:
            new = Path(folder) / self.output.name
            compiler.run([*LINK, *self.extra, *map(str, made), "-o", str(new)])
            if not self.output.exists() or self.output.read_bytes() != new.read_bytes():
                new.replace(self.output)


@contextmanager
def _alone(objects: Path) -> Iterator[None]:
    """Let one build at a time have the objects, where the system knows locks."""
    with (objects / "lock").open("w") as lock:
        with suppress(ImportError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def kept_objects() -> Iterator[Path]:
    """Yield a folder for object files: the checkout's build/kernels, or one that is thrown away."""
    root = HERE.parents[2]
    if (root / "setup.py").exists():
        yield root / "build" / "kernels"
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def build_in_place(say: Callable[[str], None]) -> tuple[str, ...]:
    """Compile the library beside this file; return its levels, the fastest first. Raises CannotBuild."""
    with kept_objects() as objects:
        return Build(HERE / LIBRARY, objects / "plain", say=say).run()


def main() -> int:
    """Compile the library, by default into its place; return the exit status."""
    parser = argparse.ArgumentParser(description="Compile the native CPU kernels.")
    parser.add_argument("--strict", action="store_true", help="warnings are errors, and no level may fail")
    parser.add_argument(
        "--optional", action="store_true", help="where there is no compiler, that is no error"
    )
    parser.add_argument("--sanitize", help="address,undefined or thread: compile for that sanitizer")
    parser.add_argument("--output", type=Path, default=HERE / LIBRARY, help="the library")
    options = parser.parse_args()
    extra: tuple[str, ...] = ()
    if options.sanitize:
        extra = (
            f"-fsanitize={options.sanitize}",
            "-fno-sanitize-recover=all",
            "-fno-omit-frame-pointer",
            "-g",
            "-O1",  # a third of the time to compile
        )
    try:
        with kept_objects() as objects:
            folder = objects / (options.sanitize or "plain")
            names = Build(options.output.absolute(), folder, NATIVE, extra, options.strict, _say).run()
    except (CannotBuild, OSError) as error:
        _say(f"no native CPU kernels: {error}")
        return 0 if options.optional else 1
    _say(f"native CPU kernels: {', '.join(names)}")
    return 0


def _say(sentence: str) -> None:
    sys.stderr.write(sentence + "\n")


if __name__ == "__main__":
    sys.exit(main())
