"""On which device and in which floating-point type a base runs, with a sentence where it isn't what was asked for."""

import os

import torch

from manylora.training.bases.types import DtypeName

DTYPES: dict[DtypeName, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
_PROBES = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


def choose_device(device: torch.device | None) -> torch.device:
    """Return the device asked for, or this process's CUDA device (LOCAL_RANK), or the CPU."""
    if device is not None:
        return device
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def choose_dtype(wanted: DtypeName, device: torch.device) -> tuple[torch.dtype, tuple[str, ...]]:
    """Return the type to train in and what to say about it."""
    if device.type == "cpu":
        return _on_cpu(wanted)
    if wanted == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return torch.float16, ("this GPU has no bfloat16: float16 is used instead of --bf16",)
    return DTYPES[wanted], ()


def _on_cpu(wanted: DtypeName) -> tuple[torch.dtype, tuple[str, ...]]:
    if wanted == "fp32":
        return torch.float32, ()
    notes: tuple[str, ...] = ()
    if wanted == "fp16":
        notes = ("a CPU can't train in float16: bfloat16 is used instead of --fp16",)
    if not any(getattr(torch.cpu, probe, lambda: False)() for probe in _PROBES):
        notes += (
            "this CPU has no bfloat16 instructions: without --bf16 and --fp16 the run is quicker, in float32 "
            "and twice the memory",
        )
    return torch.bfloat16, notes
