"""Levels beside each other, those of other processors too, where an emulator and a compiler for them are there."""

import shutil
import subprocess
from pathlib import Path

import pytest

from manylora.server.kernels.cpu.build import COMMON, LIBRARY, NATIVE, Build, find_compiler, kept_objects

DRIVER = Path(__file__).parent / "native" / "level_driver.cpp"
NEAR = 0.01
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.fixture(scope="module")
def here(compiler: None, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the driver prints on this processor."""
    printed = ran([str(driver(tmp_path_factory.mktemp("here"), "plain"))])
    return printed or pytest.skip("this processor runs no level")


def driver(folder: Path, objects: str) -> Path:
    """Compile the library's objects, and the driver with them."""
    program = folder / "driver"
    with kept_objects() as kept:
        names = Build(folder / LIBRARY, kept / objects).run()
        parts = [
            kept / objects / f"{name}.o" for name in ("dispatch", "pool", *(f"level_{n}" for n in names))
        ]
        flags = [*COMMON, f"-I{NATIVE}", *(["-static"] if objects != "plain" else [])]
        find_compiler().run([*flags, str(DRIVER), *map(str, parts), "-o", str(program)])
    return program


def ran(command: list[str]) -> list[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True
    ).stdout.splitlines()


def test_every_level_gives_the_same_bits(here: list[str]) -> None:
    """Sums are integers within a group and go over groups in one order, whatever the width of vectors."""
    assert {line.split()[0] for line in here} == {"0", "1"}
    assert len(set(here)) == 2
    assert all(float(line.split()[1]) < NEAR for line in here)


def test_arm_gives_the_same_bits(here: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which(ARM_COMPILER) or not shutil.which(ARM_EMULATOR):
        pytest.skip(f"no {ARM_COMPILER} or {ARM_EMULATOR}")
    monkeypatch.setenv("CXX", ARM_COMPILER)
    assert set(ran([ARM_EMULATOR, str(driver(tmp_path, "arm"))])) == set(here)
