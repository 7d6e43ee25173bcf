"""Where a run takes place: versions, machine, hashes of files."""

import hashlib
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

GIB = 1 << 30
PACKAGES = (
    "manylora",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "deepspeed",
)


@dataclass(frozen=True, slots=True)
class Machine:
    """What the run had to compute with."""

    system: str
    processor: str
    cores: int
    memory_gib: float
    devices: tuple[str, ...] = ()
    """Accelerators with their memory; none: the CPU trained."""


def package_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return Python's version and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def this_machine() -> Machine:
    """Describe the machine without its name."""
    import psutil
    import torch

    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        devices.append(f"{device.name}, {device.total_memory / GIB:.1f} GiB")
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=psutil.virtual_memory().total / GIB,
        devices=tuple(devices),
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def sha256_of(path: Path) -> str:
    """Return the hash of a file, read in pieces. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
