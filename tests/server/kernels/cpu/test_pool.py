"""The pool of threads, driven from C++ under each sanitizer."""

import os
import subprocess
from pathlib import Path

import pytest

from manylora.server.kernels.cpu.build import COMMON, NATIVE, CannotBuild, find_compiler

DRIVER = Path(__file__).parent / "native" / "pool_driver.cpp"


@pytest.mark.parametrize("sanitizer", ["", "thread", "address,undefined"])
def test_the_pool_keeps_its_word(compiler: None, tmp_path: Path, sanitizer: str) -> None:
    found, program = find_compiler(), tmp_path / "driver"
    flags = [*COMMON, "-Werror", "-g", "-O1", f"-I{NATIVE}"]
    if sanitizer:
        flags += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
        if not can_link(flags, tmp_path):
            pytest.skip(f"the compiler has no -fsanitize={sanitizer}")
    found.run([*flags, str(DRIVER), str(NATIVE / "pool.cpp"), "-o", str(program)])
    # A child of a process with threads may not start others under TSan.
    arguments = ["no-fork"] if sanitizer == "thread" else []
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    ended = subprocess.run(
        [program, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr


def can_link(flags: list[str], folder: Path) -> bool:
    source = folder / "nothing.cpp"
    source.write_text("int main() { return 0; }\n")
    try:
        find_compiler().run([*flags, str(source), "-o", str(folder / "nothing")])
    except CannotBuild:
        return False
    return True
