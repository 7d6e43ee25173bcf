"""Which level is taken, what is refused, and what is said where there is nothing to take."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from manylora.server.kernels.cpu import abi
from manylora.server.kernels.cpu.build import COMMON, HERE, LIBRARY, NATIVE, find_compiler, sources_digest
from manylora.server.kernels.cpu.library import (
    Kernels,
    KernelsRefused,
    Library,
    Unavailable,
    load_library,
    open_kernels,
)

FAKE = """
#include "dispatch.h"
#include "team.h"
static void nothing() {}
static const ml_export exports[] = {EXPORTS {nullptr, nullptr}};
static const ml_level levels[] = {{"fast", exports}, {"slow", exports}};
static const char *const lacking[] = {LACKING};
extern "C" {
int32_t ml_abi(void) { return ABI; }
const char *ml_sources(void) { return SOURCES; }
const ml_level *ml_level_at(int32_t i) { return i < 2 ? levels + i : nullptr; }
const char *ml_level_lacks(int32_t i) { return lacking[i]; }
ml_pool *ml_pool_create(int32_t, const int32_t *) { static int pool; return (ml_pool *)&pool; }
void ml_pool_destroy(ml_pool *) {}
}
"""
Fake = Callable[..., Path]


@pytest.fixture
def fake(compiler: None, tmp_path: Path) -> Fake:
    """Makes libraries that say of themselves what they are told to."""

    def make(
        *lacking: str,
        version: int = abi.VERSION,
        sources: str | None = None,
        exports: frozenset[str] = frozenset(abi.SIGNATURES),
    ) -> Path:
        source, library = tmp_path / "fake.cpp", tmp_path / LIBRARY
        source.write_text(FAKE)
        macros = {
            "ABI": str(version),
            "SOURCES": f'"{sources or sources_digest()}"',
            "LACKING": ", ".join(lacking or ("nullptr", "nullptr")),
            "EXPORTS": "".join(f'{{"{name}", nothing}}, ' for name in exports),
        }
        defined = [f"-D{name}={value}" for name, value in macros.items()]
        find_compiler().run([*COMMON, *defined, f"-I{NATIVE}", "-shared", str(source), "-o", str(library)])
        return library

    return make


def test_the_fastest_level_that_the_processor_has_is_taken(fake: Fake) -> None:
    assert opened(fake("nullptr", "nullptr")).level == "fast"


def test_a_level_that_it_has_not_is_passed_over(fake: Fake) -> None:
    assert opened(fake('"wings"', "nullptr")).level == "slow"


def test_a_level_can_be_named(fake: Fake) -> None:
    assert opened(fake(), "slow").level == "slow"


def test_a_level_that_the_processor_lacks_is_refused_with_what_it_lacks(fake: Fake) -> None:
    with pytest.raises(KernelsRefused, match="fast: this processor has no wings; it runs slow, plain"):
        open_kernels("fast", path=fake('"wings"', "nullptr"))


def test_a_level_that_was_not_compiled_is_refused_with_those_that_were(fake: Fake) -> None:
    with pytest.raises(KernelsRefused, match="neon: not compiled here; there are fast, slow and plain"):
        open_kernels("neon", path=fake())


def test_a_processor_that_runs_none_is_told_what_each_needs(fake: Fake) -> None:
    found = open_kernels(path=fake('"wings"', '"legs"'))
    assert isinstance(found, Unavailable)
    assert "fast needs wings; slow needs legs" in found.reason


def test_without_a_library_the_reason_says_how_to_have_one(tmp_path: Path) -> None:
    found = open_kernels(path=tmp_path / LIBRARY)
    assert isinstance(found, Unavailable)
    assert "python -m manylora.server.kernels.cpu.build" in found.reason
    with pytest.raises(KernelsRefused, match="avx2: they weren't compiled"):
        open_kernels("avx2", path=tmp_path / LIBRARY)


def test_what_is_no_library_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / LIBRARY).write_text("not this")
    found = load_library(tmp_path / LIBRARY)
    assert isinstance(found, Unavailable)
    assert "can't be loaded" in found.reason


def test_a_library_with_another_abi_is_not_taken(fake: Fake) -> None:
    found = load_library(fake(version=abi.VERSION + 1))
    assert isinstance(found, Unavailable)
    assert f"has ABI {abi.VERSION + 1}, and {abi.VERSION} is needed" in found.reason


def test_a_library_of_other_sources_is_not_taken(fake: Fake) -> None:
    found = load_library(fake(sources="0"))
    assert isinstance(found, Unavailable)
    assert "other sources" in found.reason


def test_a_library_that_lacks_a_function_is_not_taken(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake()
    monkeypatch.setitem(abi.SIGNATURES, "another", (None, ()))
    found = load_library(path)
    assert isinstance(found, Unavailable)
    assert "lacks fast.another, slow.another" in found.reason


@pytest.mark.parametrize("threads", [-1, 10**6])
def test_a_senseless_number_of_threads_is_refused(fake: Fake, threads: int) -> None:
    with pytest.raises(KernelsRefused, match="threads: give 1 to"):
        open_kernels(threads=threads, path=fake())


def test_what_is_compiled_here_opens_at_each_level_that_runs(library: Library) -> None:
    for level in library.runs:
        kernels = open_kernels(level, threads=3)
        assert isinstance(kernels, Kernels)
        assert (kernels.level, kernels.threads) == (level, 3)


# Processors that the emulator plays, and what they run. It knows no AVX-512.
PLAYED = {"Haswell": ("avx2",), "Nehalem": ()}
ASK = "from manylora.server.kernels.cpu.library import load_library; print(*load_library().runs)"


@pytest.mark.parametrize("model", PLAYED)
def test_older_processors_run_what_they_have(library: Library, model: str) -> None:
    emulator = shutil.which("qemu-x86_64")
    if emulator is None or not find_compiler().machine.startswith("x86_64"):
        pytest.skip("no qemu-user")
    if "LD_PRELOAD" in os.environ:
        pytest.skip("a sanitizer's runtime isn't for the emulator")
    command = [emulator, "-cpu", model, sys.executable, "-c", ASK]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert tuple(ended.stdout.split()) == PLAYED[model]


def opened(path: Path, level: str | None = None) -> Kernels:
    kernels = open_kernels(level, threads=2, path=path)
    assert isinstance(kernels, Kernels), kernels
    return kernels


def test_the_library_of_this_checkout_is_no_part_of_it() -> None:
    """It is compiled for one machine."""
    ignored = (HERE.parents[2] / ".gitignore").read_text().splitlines()
    assert LIBRARY in ignored
