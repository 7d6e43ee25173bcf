"""Which peers and scenes were asked for. Imports nothing, so that `--help` is quick."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which peers and scenes."""

    llama_server: Path | None
    llama_source: Path | None
    llama_python: Path
    vllm: Path | None
    peft: bool
    scenes: tuple[str, ...]
    """None named: all."""
