"""Merges the adapter given into the base given and prints what the process took: run by test_memory.py.

Resident memory as the kernel counts it, mapped files included, from after a first merge of something small.
"""

import json
import sys
from pathlib import Path

import torch

from manylora.adapters.export.export import export
from manylora.adapters.export.settings import ExportSettings
from tests.server.model.load_memory import resident


def main(small: Path, large: Path, form: str, into: str) -> None:
    torch.set_num_threads(1)
    for root in (small, large):
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        export(ExportSettings(root / "adapter", root / f"out-{form}-{into}", root / "base", form, into))  # type: ignore[arg-type]  # argv's words
    sys.stdout.write(json.dumps({"peak": resident("VmHWM") - before}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
