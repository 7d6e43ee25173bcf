"""The sizes at which a matmul's rows stop depending on its shape: one table, measured, held by test_invariance.py.

A matmul library picks its kernel by shape, and another kernel sums in another order. Within these limits a row has
the same bits whatever shares its product. Measured on x86-64 with MKL (float32) and oneDNN (bfloat16), AVX-512.
Nothing here is promised on CUDA, where cuBLAS picks by shapes that we don't control.

On Intel's processors MKL has kernels of its own for AVX-512, which sum 17 rows otherwise than 520 (K = 896, two
threads; one thread in the form that adds in place). Its strict mode for reproducible results doesn't, for any shape
tried, and takes no longer. MKL reads that wish at its first product, so this is to be imported before there is one.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class MatmulLimits:
    """Within which sizes [M, K] × [K, N] gives each of the M rows the same bits."""

    least_rows: int
    """M at least."""
    least_columns: int
    """N at least."""
    most_depth: int
    """K at most, for zeros among the K terms to change nothing: beyond it the sum is cut into blocks."""
    least_size: int
    """M · K · N at least."""
    grain: int
    """Terms are added in groups of so many: what follows zeros begins at a multiple of it."""


# MKL: M < 4 and N < 12 take other kernels, K ≥ 200 is halved; for some shapes M < 12 does as well. oneDNN: M = 1
# differs, K ≥ 1024 is cut, AVX-512 BF16 adds terms in pairs, and torch takes a kernel of its own up to M · K · N = 16³,
# which two tokens of an adapter of rank 8 for 128 features are. float16 on a CPU is emulated and rarely used; it gets
# the stricter of each.
MATMUL_LIMITS = {
    torch.float32: MatmulLimits(16, 16, 128, 1, 1),
    torch.bfloat16: MatmulLimits(2, 1, 512, 4097, 2),
    torch.float16: MatmulLimits(16, 16, 128, 4097, 2),
}
STRICT = "MKL_CBWR"
"""The variable that MKL reads: see its developer guide, "Conditional Numerical Reproducibility"."""


def hold_mkl(cpuinfo: Path = Path("/proc/cpuinfo")) -> None:
    """Ask MKL for its strict mode on an Intel processor, unless whoever started us asked for something."""
    level = torch.backends.cpu.get_cpu_capability()
    try:
        intel = "GenuineIntel" in cpuinfo.read_text(errors="replace")
    except OSError:
        intel = False
    if intel and level in ("AVX2", "AVX512"):
        os.environ.setdefault(STRICT, f"{level},STRICT")


hold_mkl()
UNLIMITED = MatmulLimits(1, 1, 1 << 30, 1, 1)
"""Where nothing is promised, nothing is padded or cut for it."""


def limits_on(device: torch.device, dtype: torch.dtype) -> MatmulLimits:
    """Return the limits that products in ``dtype`` are held to on a device."""
    return UNLIMITED if device.type == "cuda" else MATMUL_LIMITS[dtype]
