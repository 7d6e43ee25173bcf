"""How many compiled kernels a run keeps: it meets hundreds of lengths.

A micro-batch needs about 25, its layers being alike; another length needs others: keeping more is of little use.
"""

from manylora.quant.native_caches import keep_few_kernels

MOST_KERNELS, MOST_OF_TASKS = 64, 256
KERNEL_BYTES = 1 << 20
"""Of one that is kept: measured, code and buffers."""


def keep_native_caches_small(tasks: bool = False) -> None:
    """Call it before a process's first product. Tasks side by side have shapes each."""
    keep_few_kernels(MOST_OF_TASKS if tasks else MOST_KERNELS)
