"""Packing and products driven from C++: under sanitizers, and on an emulated Arm processor, with the same bits."""

import ctypes
import os
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from manylora.server.kernels.cpu import abi
from manylora.server.kernels.cpu.build import COMMON, LEVELS, NATIVE, find_compiler
from manylora.server.kernels.cpu.library import Kernels, open_kernels
from manylora.server.kernels.cpu.pack import pack
from tests.server.kernels.cpu.conftest import RUNS
from tests.server.kernels.cpu.matrices import FORMATS
from tests.server.kernels.cpu.products import product, rows_of, weights_of
from tests.server.kernels.cpu.test_pool import can_link

DRIVER = Path(__file__).parent / "native" / "linear_driver.cpp"
NAMES = (
    *("nf4-31x192", "nf4-by-32", "gptq4-shuffled", "gptq8-by-128", "awq", "int8-50x100", "split-50x100"),
    "bf16-50x101",
)
ROWS = 70
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


class Recorder:
    """Writes down what packing is asked to do instead of doing it."""

    case = b""

    def call(self, name: str, *arguments: int) -> int:
        """Keep ``pack``'s source and matrix, each array as its length and bytes."""
        assert name == "pack"
        source, matrix = abi.Source.from_address(arguments[0]), abi.Matrix.from_address(arguments[1])
        out, wide = matrix.out, getattr(matrix, "in")
        codes = {0: (out * wide + 1) // 2, 1: out * wide * source.bits // 8, 2: out * wide // 2}
        groups = (ctypes.c_int32 * (matrix.padded_in // matrix.group)).from_address(source.groups)
        scales = (out - 1) * source.of_output + max(groups) * source.of_group + 1
        head = (source.form, out, wide, source.bits, matrix.kind, matrix.padded_in, matrix.group, ROWS)
        self.case = struct.pack(
            "<8i2f2q", *head, matrix.gain, source.scaled, source.of_output, source.of_group
        ) + b"".join(
            (
                blob(source.codes, codes.get(source.form, out * wide * (1 if source.form == 3 else 2))),
                blob(source.scales, 4 * scales),
                blob(source.zeros, 2 * scales),
                blob(source.groups, 4 * len(groups)),
                blob(matrix.order, 4 * matrix.padded_in),
                blob(matrix.table, 16),
                blob(matrix.bias, 4 * out),
            )
        )
        return 0


def blob(address: int | None, nbytes: int) -> bytes:
    """Return an array's length and bytes; nothing has length 0."""
    return struct.pack("<q", nbytes) + ctypes.string_at(address, nbytes) if address else struct.pack("<q", 0)


def activations(name: str) -> Tensor:
    return torch.randn(ROWS, FORMATS[name].shape[1], generator=torch.Generator().manual_seed(3))


def bias(name: str) -> Tensor:
    return torch.randn(FORMATS[name].shape[0], generator=torch.Generator().manual_seed(4))


def write_cases(path: Path) -> None:
    with path.open("wb") as file:
        for name in NAMES:
            recorder, x = Recorder(), activations(name)
            pack(FORMATS[name], bias(name), recorder)
            file.write(recorder.case + blob(x.data_ptr(), x.nbytes))


def driven(program: Sequence[str | Path], folder: Path) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Run the driver; return by the cases' names products [rows, out] and the last output's weights [in].

    Products by activations of 8 bits, and by those of bfloat16.
    """
    cases, output = folder / "cases", folder / "products"
    write_cases(cases)
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    ended = subprocess.run(
        [*program, cases, output], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr
    floats = torch.frombuffer(bytearray(output.read_bytes()), dtype=torch.float32)
    shapes = [FORMATS[name].shape for name in NAMES]
    sizes = [n for out, wide in shapes for n in (ROWS * out, wide, ROWS * out)]
    parts = iter(torch.split_with_sizes(floats, sizes))
    products = {}
    for name in NAMES:
        by_bytes, weights, by_bf16 = (next(parts) for _ in range(3))
        products[name] = by_bytes.view(ROWS, -1), weights, by_bf16.view(ROWS, -1)
    return products


def flags_of(level: str) -> tuple[str, ...]:
    return next(found.flags for found in LEVELS if found.name == level)


def held_against(results: dict[str, tuple[Tensor, Tensor, Tensor]]) -> None:
    """Compare with what this processor computes, where sums are integers to the bit; else with float64."""
    kernels = open_kernels(RUNS[0], 1)
    assert isinstance(kernels, Kernels)
    for name, (got, weights, wide) in results.items():
        matrix = pack(FORMATS[name], bias(name), kernels)
        want = product(kernels, matrix, activations(name))
        last = torch.tensor([matrix.shape[0] - 1], dtype=torch.int32)
        assert torch.equal(weights, rows_of(kernels, matrix, last)[0]), name
        assert torch.equal(got, want), name
        if matrix.kind == abi.BF16:
            assert torch.equal(wide, want), name
            continue
        packed, x = weights_of(kernels, matrix).double(), activations(name).bfloat16().double()
        size = x.abs() @ packed.abs().T + bias(name).abs()
        assert ((wide - (x @ packed.T + bias(name))).abs() <= 2e-6 * size).all(), name


@pytest.mark.skipif("avx2" not in RUNS, reason="this processor has no AVX2")
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_nothing_is_read_or_written_past_its_end_or_by_two_at_once(
    compiler: None, tmp_path: Path, sanitizer: str
) -> None:
    flags = [*COMMON, "-O1", "-g", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", f"-I{NATIVE}"]
    if not can_link(flags, tmp_path):
        pytest.skip(f"the compiler has no -fsanitize={sanitizer}")
    program = tmp_path / "driver"
    find_compiler().run(
        [*flags, *flags_of("avx2"), str(DRIVER), str(NATIVE / "pool.cpp"), "-o", str(program)]
    )
    held_against(driven([program], tmp_path))


@pytest.mark.skipif(
    not RUNS or not shutil.which(ARM_COMPILER) or not shutil.which(ARM_EMULATOR),
    reason=f"{ARM_COMPILER} or {ARM_EMULATOR} isn't installed",
)
def test_an_arm_processor_gets_the_same_bits(tmp_path: Path) -> None:
    program = tmp_path / "driver"
    command = [ARM_COMPILER, *COMMON, "-O1", "-static", f"-I{NATIVE}", *flags_of("neon")]
    subprocess.run([*command, DRIVER, NATIVE / "pool.cpp", "-o", program], check=True)
    held_against(driven([ARM_EMULATOR, program], tmp_path))
