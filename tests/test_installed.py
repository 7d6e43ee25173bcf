"""What `pip install .` brings: one top-level name, and everything that the server and the training need below it."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from manylora.server.kernels.cpu.build import LEVELS, CannotBuild, find_compiler

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("adapters", "demo", "loadtest", "manylora", "quant", "server", "training")
NATIVE = "server/kernels/cpu/native"
LIBRARY = "manylora/server/kernels/cpu/_kernels.so"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, in which the checkout's build folder doesn't show, with levels that compile at once."""
    copy = tmp_path_factory.mktemp("copy")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "constraints-cpu.txt"):
        shutil.copy(ROOT / name, copy / name)
    for level in LEVELS:
        short = f'#define ML_LEVEL {level.name}\n#include "table.h"\n'
        (copy / NATIVE / f"level_{level.name}.cpp").write_text(short)
    return copy


def build_wheel(source: Path, place: Path, **environment: str) -> Path:
    flags = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(place)]
    command = [sys.executable, "-m", "pip", "wheel", *flags, str(source)]
    subprocess.run(command, env={**os.environ, **environment}, check=True)
    (wheel,) = place.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def plain_wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built where there is no C++ compiler."""
    return build_wheel(source, tmp_path_factory.mktemp("plain"), CXX="/bin/false")


@pytest.fixture(scope="module")
def files(plain_wheel: Path) -> list[str]:
    """Names of the files in it."""
    return zipfile.ZipFile(plain_wheel).namelist()


def test_nothing_is_installed_beside_manylora(files: list[str]) -> None:
    names = {name.split("/")[0] for name in files}
    assert {name for name in names if not name.endswith(".dist-info")} == {"manylora"}


def test_every_file_of_the_repository_is_there(files: list[str]) -> None:
    for folder in FOLDERS:
        below = Path("manylora") if folder == "manylora" else Path("manylora", folder)
        wanted = {str(below / path.relative_to(ROOT / folder)) for path in (ROOT / folder).rglob("*.py")}
        assert wanted <= set(files)


def test_the_demo_and_the_pages_of_training_are_there(files: list[str]) -> None:
    assert "manylora/demo/base/model.safetensors" in files
    assert "manylora/demo/adapters/sql/adapter_model.safetensors" in files
    assert any(name.startswith("manylora/training/report/") and name.endswith(".html") for name in files)


REASON = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path.insert(0, sys.argv[1])
from manylora.server.kernels.cpu.library import open_kernels
print(open_kernels().reason)
"""


def test_without_a_compiler_the_wheel_is_for_every_machine_and_says_what_is_missing(
    plain_wheel: Path, files: list[str], tmp_path: Path
) -> None:
    assert plain_wheel.name.endswith("-py3-none-any.whl")
    assert LIBRARY not in files
    zipfile.ZipFile(plain_wheel).extractall(tmp_path)
    command = [sys.executable, "-c", REASON, str(tmp_path)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "weren't compiled" in ended.stdout


def test_with_a_compiler_the_wheel_is_for_every_python_on_such_a_machine(
    plain_wheel: Path, source: Path, tmp_path: Path
) -> None:
    """And one that was built without does not show in the next, nor the other way round."""
    try:
        find_compiler()
    except CannotBuild as error:
        pytest.skip(str(error))
    wheel = build_wheel(source, tmp_path / "with")
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("any.whl")
    assert LIBRARY in zipfile.ZipFile(wheel).namelist()
    after = build_wheel(source, tmp_path / "after", CXX="/bin/false")
    assert after.name == plain_wheel.name
    assert LIBRARY not in zipfile.ZipFile(after).namelist()


def test_sources_of_the_kernels_are_in_a_source_distribution(source: Path, tmp_path: Path) -> None:
    code = f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, check=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[-1] for name in opened.getnames()}
    assert {path.relative_to(source).as_posix() for path in (source / NATIVE).iterdir()} <= names
    assert not any(name.endswith(".so") for name in names)


WITHOUT_INSTALLATION = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import manylora.server.errors, manylora.training.errors
print(manylora.server.errors.__file__)
"""


def test_a_checkout_is_whole_for_whoever_stands_in_it() -> None:
    """Its folder manylora/ comes before what is installed, and without the others."""
    command = [sys.executable, "-c", WITHOUT_INSTALLATION]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == str(ROOT / "server" / "errors.py")
