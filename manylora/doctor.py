"""`manylora doctor`: what this machine can do, what is missing, and what that costs. Changes nothing."""

import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal

import psutil
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from manylora.server.kernels.choose import COST, sound_kernels
from manylora.server.kernels.cpu.library import Unavailable, load_library

Verdict = Literal["ok", "missing", "slow"]
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    verdict: Verdict
    detail: str


def examine() -> list[Finding]:
    """Look at the interpreter, the processor, memory, the GPU and the optional packages."""
    return [_python(), _processor(), _kernels(), _memory(), _disk(), _gpu(), _torch(), *_packages()]


def report(console: Console) -> None:
    """Print the findings as a table, and what to do about them."""
    table = Table(title="manylora doctor", title_justify="left")
    for column in ("what", "", "detail"):
        table.add_column(column)
    colours = {"ok": "green", "missing": "yellow", "slow": "yellow"}
    findings = examine()
    for finding in findings:
        table.add_row(
            finding.what, f"[{colours[finding.verdict]}]{finding.verdict}[/]", escape(finding.detail)
        )
    console.print(table)
    lacking = [finding.what for finding in findings if finding.verdict != "ok"]
    console.print(f"Works without, or slower: {', '.join(lacking)}." if lacking else "Everything is there.")


def _python() -> Finding:
    return Finding("Python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _processor() -> Finding:
    cores = psutil.cpu_count(logical=True) or 1
    allowed = len(psutil.Process().cpu_affinity()) if sys.platform == "linux" else cores
    capability = torch.backends.cpu.get_cpu_capability()
    detail = f"{allowed} of {cores} cores usable, {capability}"
    if capability in ("DEFAULT", "NO AVX"):
        return Finding("processor", "slow", f"{detail}: without AVX2, CPU serving is slow")
    bf16 = "yes" if cpu_has_bf16() else "no (float32 is used)"
    return Finding("processor", "ok", f"{detail}, bfloat16 instructions: {bf16}")


def _kernels() -> Finding:
    what = "native CPU kernels"
    opened = sound_kernels()
    if isinstance(opened, Unavailable):
        return Finding(what, "slow", f"{opened.reason}. {COST}")
    library = load_library()
    others = (
        [] if isinstance(library, Unavailable) else [name for name in library.runs if name != opened.level]
    )
    also = f"; also {', '.join(others)} (--kernels)" if others else ""
    finer = "int8 activations (--activations bfloat16: finer, slower)"
    return Finding(what, "ok", f"{opened.level}, {finer}, threads: {opened.threads}{also}")


def cpu_has_bf16() -> bool:
    """Whether bfloat16 products run in hardware (AVX-512 BF16 or AMX), so that it beats float32."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    detail = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    return Finding("memory", "ok" if memory.available > 2 * GIB else "slow", detail)


def _disk() -> Finding:
    usage = shutil.disk_usage(".")
    return Finding("disk here", "ok" if usage.free > GIB else "slow", f"{usage.free / GIB:.1f} GiB free")


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        return Finding("GPU", "missing", "no CUDA device: the CPU serves")
    properties = torch.cuda.get_device_properties(0)
    return Finding("GPU", "ok", f"{properties.name}, {properties.total_memory / GIB:.0f} GiB")


def _torch() -> Finding:
    return Finding("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")


OPTIONAL = {
    "bitsandbytes": "fused NF4 matmul on CPUs with AVX-512 BF16; pip install 'manylora[nf4]'",
    "peft": "`manylora bench peft` and the demo's build; pip install 'manylora[peft]'",
    "openai": "the client that README shows; pip install openai",
}


def _packages() -> list[Finding]:
    findings = []
    for name, use in OPTIONAL.items():
        try:
            found = find_spec(name) is not None and version(name)
        except PackageNotFoundError:
            found = False
        detail = f"{found}: {use.split(';')[0]}" if found else use
        findings.append(Finding(name, "ok" if found else "missing", detail))
    return findings
