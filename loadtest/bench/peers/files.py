"""What every peer loads: one random base and its adapters, for llama.cpp turned into GGUF by its own tools."""

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from manylora.loadtest.bench.beside_peft import Files

HINTS: Mapping[str, str] = {
    "BPE pre-tokenizer": "; a made vocabulary is strange to it: give a real one with --tokenizer",
    "ModuleNotFoundError": "; install that, or name a python that has it with --llama-python",
}
"""What to do about an error of the converters, by a word in it."""


class PeerError(Exception):
    """A peer can't be measured. One line: why, and what to do."""


@dataclass(frozen=True, slots=True)
class GgufFiles:
    """What llama.cpp loads."""

    base: Path
    adapters: tuple[Path, ...]


def convert(files: Files, server: Path, source: Path, python: Path, scratch: Path) -> GgufFiles:
    """Convert base and adapters with the scripts of llama.cpp's ``source``, and quantise to Q4_0. Raises PeerError."""
    quantize = _quantize(server)
    for script in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        if not (source / script).is_file():
            raise PeerError(f"{source} holds no {script}: give llama.cpp's source with --llama-source")
    whole, base = scratch / "base-16.gguf", scratch / "base.gguf"
    if not base.is_file():
        hf = [str(python), str(source / "convert_hf_to_gguf.py"), str(files.base), "--outfile", str(whole)]
        run_tool([*hf, "--outtype", "bf16"])
        run_tool([str(quantize), "--pure", str(whole), str(base), "Q4_0"])
        whole.unlink()
    adapters = []
    for adapter in files.adapters:
        adapters.append(scratch / f"{adapter.name}.gguf")
        if not adapters[-1].is_file():
            lora = [str(python), str(source / "convert_lora_to_gguf.py"), str(adapter)]
            run_tool([*lora, "--base", str(files.base), "--outfile", str(adapters[-1])])
    return GgufFiles(base, tuple(adapters))


def _quantize(server: Path) -> Path:
    beside = server.with_name("llama-quantize")
    found = beside if beside.is_file() else shutil.which("llama-quantize")
    if found is None:
        raise PeerError(f"no llama-quantize beside {server} or on the PATH: build it too")
    return Path(found)


def run_tool(line: list[str]) -> None:
    """Run one of llama.cpp's tools. Raises PeerError with its last line, and what to do where that is known."""
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        tool = Path(line[1] if line[1].endswith(".py") else line[0]).name
        hint = next((hint for word, hint in HINTS.items() if word in done.stderr), "")
        raise PeerError(f"{tool} failed: {said[-1] if said else f'exit status {done.returncode}'}{hint}")
