"""What native libraries keep for every shape that they have met, kept small: a run meets hundreds of lengths.

oneDNN compiles a kernel for each shape of a product in bfloat16 on a CPU, and both it and PyTorch's layer over it keep
the last 1,024 of them: on rows of varying length that grows to a GiB. A micro-batch needs about 25, its layers being
alike; another length needs others, so that keeping more is of little use.
"""

import os

CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Read by oneDNN (dev_guide_primitive_cache) and by ideep at the first product of the process."""
MOST_KERNELS, MOST_OF_TASKS = 64, 256
KERNEL_BYTES = 1 << 20
"""Of one that is kept: measured, code and buffers."""


def keep_native_caches_small(tasks: bool = False) -> None:
    """Call it before a process's first product; a user's own setting stays. Tasks side by side have shapes each."""
    for name in CAPACITIES:
        os.environ.setdefault(name, str(MOST_OF_TASKS if tasks else MOST_KERNELS))
