"""Compiling: with and without a compiler, with levels that fail, and once only."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from manylora.server.kernels.cpu.build import LEVELS, LIBRARY, NATIVE, Build, CannotBuild, kept_objects
from manylora.server.kernels.cpu.library import Library, load_library

LEVEL = '#define ML_LEVEL {name}\n#include "table.h"\n'
BuildOf = Callable[..., Build]


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """The sources, with levels that export nothing and compile at once."""
    folder = tmp_path / "native"
    shutil.copytree(NATIVE, folder)
    for level in LEVELS:
        (folder / f"level_{level.name}.cpp").write_text(LEVEL.format(name=level.name))
    return folder


@pytest.fixture
def build(compiler: None, sources: Path, tmp_path: Path) -> BuildOf:
    def make(*, strict: bool = False, say: Callable[[str], None] = print) -> Build:
        return Build(tmp_path / LIBRARY, tmp_path / "objects", sources, strict=strict, say=say)

    return make


def test_the_sources_compile_without_a_warning(compiler: None, tmp_path: Path) -> None:
    with kept_objects() as objects:
        assert Build(tmp_path / LIBRARY, objects / "plain", strict=True).run()


def test_what_is_compiled_can_be_loaded_the_fastest_level_first(build: BuildOf, tmp_path: Path) -> None:
    names = build(strict=True).run()
    order = [level.name for level in LEVELS]
    assert [order.index(name) for name in names] == sorted(order.index(name) for name in names)
    assert (tmp_path / LIBRARY).exists()


@pytest.mark.parametrize("command", ["/bin/false", "no-such-compiler", "echo"])
def test_without_a_compiler_it_says_so(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", command)
    with pytest.raises(CannotBuild, match=r"C\+\+|no-such-compiler|echo"):
        Build(tmp_path / LIBRARY, tmp_path / "objects").run()
    assert not (tmp_path / LIBRARY).exists()


def test_only_what_has_changed_is_compiled_again(
    build: BuildOf, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, wrapper = tmp_path / "log", tmp_path / "compiler"
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {os.environ.get("CXX") or "c++"} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))

    def compiled() -> set[str]:
        log.write_text("")
        build().run()
        return {
            Path(line.split(" -c ")[1].split()[0]).name
            for line in log.read_text().splitlines()
            if " -c " in line
        }

    assert {"pool.cpp", "dispatch.cpp"} < compiled()
    library = (tmp_path / LIBRARY).stat()
    assert compiled() == set()
    assert (tmp_path / LIBRARY).stat().st_ino == library.st_ino  # a running server's file is left alone
    with (sources / "pool.cpp").open("a") as file:
        file.write("// changed\n")
    # dispatch.cpp carries the digest of all sources.
    assert compiled() == {"pool.cpp", "dispatch.cpp"}


def test_a_level_that_fails_is_left_out_and_told(build: BuildOf, sources: Path) -> None:
    names = build().run()
    if len(names) == 1:
        pytest.skip("there is one level for this machine")
    said: list[str] = []
    (sources / f"level_{names[0]}.cpp").write_text("#error not today\n")
    assert build(say=said.append).run() == names[1:]
    assert len(said) == 1
    assert names[0] in said[0]
    assert "not today" in said[0]
    with pytest.raises(CannotBuild, match="not today"):
        build(strict=True).run()


def test_a_warning_is_an_error_where_that_is_asked_for_even_of_a_kept_object(
    build: BuildOf, sources: Path
) -> None:
    with (sources / "pool.cpp").open("a") as file:
        file.write("static int unused() { return 1; }\n")
    for _ in range(2):
        assert build().run()
        with pytest.raises(CannotBuild, match="unused"):
            build(strict=True).run()


def test_a_library_of_other_sources_is_not_taken(build: BuildOf, tmp_path: Path) -> None:
    build().run()
    found = load_library(tmp_path / LIBRARY)
    assert not isinstance(found, Library)
    assert "other sources" in found.reason


def test_the_command_says_what_it_compiled_or_why_not(compiler: None, tmp_path: Path) -> None:
    module = ["-m", "manylora.server.kernels.cpu.build"]
    command = [sys.executable, *module, "--output", str(tmp_path / LIBRARY)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ended.stderr.splitlines()[-1].startswith("native CPU kernels: ")
    without = {**os.environ, "CXX": "/bin/false"}
    for options, status in (([], 1), (["--optional"], 0)):
        ended = subprocess.run([*command, *options], env=without, capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stderr) == (
            status,
            "no native CPU kernels: CXX=/bin/false is no C++ compiler\n",
        )
