"""What native libraries keep for every shape that they have met, kept small.

oneDNN compiles a kernel of about 1 MiB for each shape of a product in bfloat16 on a CPU, and both it and PyTorch's
layer over it keep the last 1,024 of them: on rows of varying number or length that grows to a GiB.
"""

import os

CAPACITIES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""Read by oneDNN (dev_guide_primitive_cache) and by ideep at the first product of the process."""


def keep_few_kernels(most: int) -> None:
    """Keep so many. Call it before a process's first product; a user's own setting stays."""
    for name in CAPACITIES:
        os.environ.setdefault(name, str(most))
