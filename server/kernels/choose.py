"""The one place that chooses a backend."""

import torch

from manylora.server.kernels.backend import AnyBackend
from manylora.server.kernels.cpu.backend import CpuBackend
from manylora.server.kernels.cpu.cores import find_cores
from manylora.server.kernels.cpu.library import KernelsRefused, Unavailable, open_kernels
from manylora.server.kernels.plain import PlainBackend

AUTO, PLAIN = "auto", "plain"
CPU = torch.device("cpu")


def choose_backend(
    device: torch.device, dtype: torch.dtype, kernels: str = AUTO, threads: int = 0
) -> AnyBackend:
    """Return the fastest backend for a device and the dtype of activations there, or the one that is asked for.

    ``kernels``: auto, plain (torch), or a level of the native CPU kernels; ``threads`` are theirs, 0: as many as torch
    has, and not more than there are cores. Raises KernelsRefused for kernels that can't be had here.
    """
    if device.type != CPU.type and kernels not in (AUTO, PLAIN):
        raise KernelsRefused(f"{kernels}: these kernels are the CPU's, and the model runs on {device.type}")
    if device.type == CPU.type and kernels != PLAIN:
        count = threads or min(torch.get_num_threads(), find_cores().threads)
        opened = open_kernels(None if kernels == AUTO else kernels, count)
        if not isinstance(opened, Unavailable):
            return CpuBackend(opened, dtype)
    return PlainBackend(device, dtype)


def what_is_missing(backend: AnyBackend, kernels: str) -> str | None:
    """Return why a CPU is served by torch although nobody asked for that, and what it costs; None where it isn't so."""
    if backend.device.type != CPU.type or isinstance(backend, CpuBackend) or kernels != AUTO:
        return None
    opened = open_kernels()
    return f"no native CPU kernels: {opened.reason}. {COST}" if isinstance(opened, Unavailable) else None


COST = "torch computes instead, which takes several times as long a token"


def leave_cores_to(backend: AnyBackend) -> None:
    """Let torch have one thread where the backend has its own: two pools on the same cores wait for each other.

    To be called once the weights are loaded, which torch's threads do, and before another thread computes.
    """
    if isinstance(backend, CpuBackend):
        torch.set_num_threads(1)
