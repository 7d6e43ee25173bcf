"""What a figure was measured with and on: versions, commit, processor, device. Stored beside every figure."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("manylora", "torch", "transformers", "peft", "bitsandbytes", "triton")
ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, object]:
    """Return versions, commit and machine as plain JSON values. Imports torch."""
    import torch

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "versions": found,
        "commit": commit(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": list(os.getloadavg()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch_threads": torch.get_num_threads(),
    }


def commit() -> str | None:
    """Return the commit of the code that runs, "+" appended when files differ from it; None outside a clone."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def processor() -> str:
    """Return the processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def headline() -> str:
    """Return one line that says where a figure comes from."""
    here = environment()
    versions = here["versions"]
    assert isinstance(versions, dict)
    device = here["gpu"] or f"{here['processor']}, {here['cores']} cores, {here['torch_threads']} threads"
    names = ", ".join(f"{name} {versions[name]}" for name in PACKAGES[1:] if name in versions)
    return f"{device}; {names}; commit {here['commit'] or 'unknown'}"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
