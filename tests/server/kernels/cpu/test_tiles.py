"""The level of AMX with its tiles emulated: all of its logic, held to the bits of a level that runs here.

No test runs the instructions themselves: that they are in the level is seen in what the compiler made of it.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from manylora.server.kernels.check import fault
from manylora.server.kernels.choose import NEAR
from manylora.server.kernels.cpu import build
from manylora.server.kernels.cpu.backend import Activations, CpuBackend
from manylora.server.kernels.cpu.build import LEVELS, LIBRARY, Build, kept_objects
from manylora.server.kernels.cpu.library import Kernels, Library, load_library, open_kernels
from manylora.server.model.loader import Quantization
from tests.server.kernels.cpu.conftest import RUNS
from tests.server.kernels.cpu.matrices import FORMATS
from tests.server.kernels.cpu.products import product
from tests.server.kernels.cpu.test_backend import WHOLE, answers, native
from tests.server.kernels.cpu.test_linear import activations, opened, packed
from tests.server.kernels.cpu.test_linear_driver import DRIVER, driven, flags_of, held_against
from tests.server.model.models import save_model

HERE = Path(__file__).parent / "native"
BESIDE = "avx512_bf16"
NAMES = [name for name in FORMATS if not name.startswith("bf16")]
pytestmark = pytest.mark.skipif(BESIDE not in RUNS, reason=f"this processor has no {BESIDE}")


@pytest.fixture(scope="module")
def emulated(compiler: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Library]:
    """The level of AMX alone, whose tiles are plain C++."""
    extra = ("-O1", "-DML_EMULATE_TILES", f"-I{HERE}")
    path = tmp_path_factory.mktemp("tiles") / LIBRARY
    with pytest.MonkeyPatch.context() as patch, kept_objects() as objects:
        patch.setattr(build, "LEVELS", tuple(level for level in LEVELS if level.name == "amx"))
        Build(path, objects / "tiles", extra=extra).run()
    found = load_library(path)
    assert isinstance(found, Library), found
    yield found
    assert count(found, "units") == 0  # each thread has given its tiles back


@pytest.fixture
def tiled(emulated: Library) -> Kernels:
    return Kernels(emulated, emulated.levels[0], 2)


def count(library: Library, what: str) -> int:
    return ctypes.c_int64.in_dll(library.handle, f"ml_tile_{what}").value


@pytest.mark.parametrize("name", NAMES)
def test_tiles_give_the_bits_of_vectors(name: str, tiled: Kernels, emulated: Library) -> None:
    matrix = packed(name, tiled)
    x = activations(matrix.shape[1])
    want = product(opened(BESIDE, 2), matrix, x)
    for rows in (1, 15, 16, 17, 31, 32, 33, 47, 64, 65, 70):
        before = count(emulated, "dots")
        assert torch.equal(product(tiled, matrix, x[:rows]), want[:rows]), rows
        groups, tall = matrix.padded_in // matrix.group, -(-rows // 16)
        used = 2 * groups * matrix.blocks * tall if rows >= 16 else 0
        assert count(emulated, "dots") - before == used
        assert count(emulated, "units") == 0


def test_tiles_driven_from_cpp_ask_as_often_as_is_counted(compiler: None, tmp_path: Path) -> None:
    program = tmp_path / "driver"
    flags = [*build.COMMON, "-O1", "-DML_EMULATE_TILES", f"-I{HERE}", f"-I{build.NATIVE}", *flags_of("amx")]
    build.find_compiler().run([*flags, str(DRIVER), str(build.NATIVE / "pool.cpp"), "-o", str(program)])
    held_against(driven([program], tmp_path))


def test_what_is_not_finite_is_felt_in_its_own_row_alone(tiled: Kernels) -> None:
    matrix = packed("nf4-64x896", tiled)
    x = activations(896, 20)
    clean = product(tiled, matrix, x)
    x[4, 100] = float("nan")
    y = product(tiled, matrix, x)
    assert not y[4].isfinite().any()
    others = [row for row in range(20) if row != 4]
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_model_answers_to_the_bit_as_by_vectors(
    quantization: Quantization, tiled: Kernels, emulated: Library, tmp_path: Path
) -> None:
    save_model("qwen2-window", tmp_path)
    before = count(emulated, "dots")
    ours = answers(native(tmp_path, tiled, quantization), WHOLE)
    assert count(emulated, "dots") > before
    assert all(map(torch.equal, ours, answers(native(tmp_path, opened(BESIDE, 2), quantization), WHOLE)))


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_what_a_server_asks_of_a_level_asks_its_tiles(
    kind: Activations, tiled: Kernels, emulated: Library
) -> None:
    before = count(emulated, "dots")
    assert fault(CpuBackend(tiled, torch.float32, kind), NEAR[kind]) is None
    assert (count(emulated, "dots") > before) == (kind == "int8")


def test_without_tiles_the_level_is_refused_and_named(emulated: Library, library: Library) -> None:
    assert emulated.levels[0].lacks is None
    assert isinstance(open_kernels(threads=1), Kernels)
    for level in library.levels:
        if level.name == "amx":
            assert level.lacks in (None, "AMX", "AMX INT8", "the system's leave to use AMX tiles")


@pytest.mark.skipif(not shutil.which("objdump"), reason="no objdump")
def test_the_level_is_compiled_to_the_instructions_of_tiles(compiler: None, tmp_path: Path) -> None:
    with kept_objects() as objects:
        if "amx" not in Build(tmp_path / LIBRARY, objects / "plain").run():
            pytest.skip("this compiler doesn't know AMX")
        level = objects / "plain" / "level_amx.o"
        said = subprocess.run(["objdump", "-d", level], capture_output=True, text=True, check=True).stdout
    for instruction in ("ldtilecfg", "tilezero", "tileloadd", "tdpbusd", "tilestored", "tilerelease"):
        assert instruction in said, instruction
    assert "tdpbf16ps" not in said  # dispatch.cpp doesn't ask for it
