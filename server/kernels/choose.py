"""The one place that chooses a backend."""

import logging
from collections.abc import Mapping
from functools import cache

import torch

from manylora.server.kernels.backend import AnyBackend
from manylora.server.kernels.check import fault
from manylora.server.kernels.cpu.backend import Activations, CpuBackend
from manylora.server.kernels.cpu.cores import find_cores
from manylora.server.kernels.cpu.kv_cache import FORMS
from manylora.server.kernels.cpu.library import (
    Kernels,
    KernelsRefused,
    Unavailable,
    load_library,
    open_kernels,
)
from manylora.server.kernels.plain import PlainBackend
from manylora.server.kernels.plain.cuda_graph import CudaRecorder
from manylora.server.kernels.plain_check import sound_plain

AUTO, PLAIN = "auto", "plain"
CPU = torch.device("cpu")
NEAR: Mapping[Activations, float] = {"int8": 0.05, "bfloat16": 0.02}
"""How far the logits of noise may be off plain torch's, relative: an activation of 8 bits is off by up to 1/255 of its
group's range, in every matrix; the head's weights are of 8 bits in both."""
COST = "torch computes instead, which takes several times as long a token"
log = logging.getLogger(__name__)


def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    kernels: str = AUTO,
    threads: int = 0,
    activations: Activations = "int8",
    kv_dtype: torch.dtype | None = None,
    *,
    cuda_graphs: bool = True,
) -> AnyBackend:
    """Return the fastest backend for a device and the dtype of activations there, or the one that is asked for.

    ``kernels``: auto, plain (torch), or a level of the native CPU kernels; ``threads`` are theirs, 0: as many as torch
    has, and not more than there are cores; ``activations`` are what those multiply 4- and 8-bit weights by.
    ``kv_dtype``: in which type keys and values are kept, bfloat16 or int8; None: bfloat16 by native kernels, ``dtype``
    by torch. ``cuda_graphs``: whether a GPU's decode steps are recorded. Raises KernelsRefused for kernels that can't
    be had here.
    """
    if device.type != CPU.type and kernels not in (AUTO, PLAIN):
        raise KernelsRefused(f"{kernels}: these kernels are the CPU's, and the model runs on {device.type}")
    if device.type == CPU.type and kernels != PLAIN:
        count = threads or min(torch.get_num_threads(), find_cores().threads)
        opened = sound_kernels(kernels, count, activations)
        if isinstance(opened, Kernels):
            return CpuBackend(opened, dtype, activations, kv_dtype or torch.bfloat16)
    if device.type != "cuda":
        return PlainBackend(device, dtype, kv_dtype)
    return sound_plain(device, dtype, kv_dtype, CudaRecorder(device) if cuda_graphs else None)


def sound_kernels(
    kernels: str = AUTO, threads: int | None = None, activations: Activations = "int8"
) -> Kernels | Unavailable:
    """Open a level that computes what plain torch does: the one named, or the fastest that this processor runs.

    Raises KernelsRefused when a level is named that can't be had, or computes something else.
    """
    if kernels != AUTO:
        opened = open_kernels(kernels, threads)
        wrong = _wrong(kernels, activations)
        if wrong is not None:
            raise KernelsRefused(f"{kernels}: {wrong}")
        return opened
    library = load_library()
    if isinstance(library, Unavailable) or not library.runs:
        return open_kernels()  # the reason
    faults = {}
    for level in library.runs:
        wrong = _wrong(level, activations)
        if wrong is None:
            return open_kernels(level, threads)
        log.warning("native CPU kernels %s are passed over: %s", level, wrong)
        faults[level] = wrong
    return Unavailable("; ".join(f"{level}: {wrong}" for level, wrong in faults.items()))


@cache
def _wrong(level: str, activations: Activations) -> str | None:
    """Return what a level computes wrongly, asked once in a process."""
    opened = open_kernels(level, 2)
    if isinstance(opened, Unavailable):
        return None
    backends = (CpuBackend(opened, torch.float32, activations, kv_dtype) for kv_dtype in FORMS)
    found = (fault(backend, NEAR[activations]) for backend in backends)
    return next((wrong for wrong in found if wrong is not None), None)


def what_is_missing(backend: AnyBackend, kernels: str) -> str | None:
    """Return why a CPU is served by torch although nobody asked for it, and what that costs; None if that isn't so."""
    if backend.device.type != CPU.type or isinstance(backend, CpuBackend) or kernels != AUTO:
        return None
    opened = sound_kernels()
    return f"no native CPU kernels: {opened.reason}. {COST}" if isinstance(opened, Unavailable) else None


def leave_cores_to(backend: AnyBackend) -> None:
    """Let torch have one thread where the backend has its own: two pools on the same cores wait for each other.

    To be called once the weights are loaded, which torch's threads do, and before another thread computes.
    """
    if isinstance(backend, CpuBackend):
        torch.set_num_threads(1)
