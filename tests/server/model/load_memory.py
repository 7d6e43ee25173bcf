"""Loads the model directory given in NF4 and prints what the process took: run by test_load_memory.py.

Resident memory as the kernel counts it, files that are mapped included, so that neither torch nor safetensors can
hold anything unseen.
"""

import json
import sys
from pathlib import Path

import torch

from manylora.quant.nf4 import quantize_nf4
from manylora.server.kernels.plain import PlainBackend
from manylora.server.model.loader import load_weights


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def main(directory: Path, double_quant: bool) -> None:
    torch.set_num_threads(1)
    backend = PlainBackend(torch.device("cpu"), torch.bfloat16)
    quantize_nf4(torch.ones(256, 256), double_quant=True)  # libraries and tables that come with first use
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    _, weights, report = load_weights(directory, backend, quantization="nf4", double_quant=double_quant)
    figures = {
        "model": report.linear_bytes + report.other_bytes,
        "held": resident("VmRSS") - before,
        "peak": resident("VmHWM") - before,
        "layers": len(weights.layers),
    }
    sys.stdout.write(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "double")
