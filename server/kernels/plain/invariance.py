"""The sizes at which a matmul's rows stop depending on its shape: one table, measured, held by test_invariance.py.

A matmul library picks its kernel by shape, and another kernel sums in another order. Within these limits a row has
the same bits whatever shares its product. Measured on x86-64 with MKL (float32) and oneDNN (bfloat16), AVX-512.
Nothing here is promised on CUDA, where cuBLAS picks by shapes that we don't control.
"""

from dataclasses import dataclass

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
UNLIMITED = MatmulLimits(1, 1, 1 << 30, 1, 1)
"""Where nothing is promised, nothing is padded or cut for it."""


def limits_on(device: torch.device, dtype: torch.dtype) -> MatmulLimits:
    """Return the limits that products in ``dtype`` are held to on a device."""
    return UNLIMITED if device.type == "cuda" else MATMUL_LIMITS[dtype]
