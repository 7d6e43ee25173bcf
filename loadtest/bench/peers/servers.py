"""Starts a peer's server for a scene's models, and says which version and which instruction set it is."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx

from manylora.loadtest.bench.beside_peft import CompareError, Files, serving
from manylora.loadtest.bench.peers.files import GgufFiles, PeerError
from manylora.loadtest.bench.peers.scenes import LLAMA, OURS, VLLM
from manylora.loadtest.material.environment import environment
from manylora.loadtest.material.server_process import ServerProcess, free_port, running, start_line

START_SECONDS = 900.0
VLLM_MOST_ADAPTERS = 8
ROOM = 128
"""Tokens of a stream beyond the longest prompt and answer."""
_SYSTEM = re.compile(r"system_info:.*?\|(.*)")


@dataclass(frozen=True, slots=True)
class Started:
    """A running server, and how it names its models."""

    url: str
    kind: str
    """Of dialects.KINDS."""
    base: str
    adapters: tuple[str, ...]
    built_for: str
    """The instruction set that it computes with, as it says itself."""


class Peer(Protocol):
    """A server to measure."""

    @property
    def name(self) -> str:
        """Of scenes.PEERS."""
        ...

    @property
    def base_apart(self) -> bool:
        """Whether its base is measured on a server without adapters, since adapters that nobody asks cost it."""
        ...

    def version(self) -> str:
        """Return its version. Raises PeerError."""
        ...

    def start(self, *, adapters: bool) -> AbstractContextManager[Started]:
        """Run it until the block ends, with the adapters loaded or as its base alone. Raises PeerError."""
        ...


@dataclass(frozen=True, slots=True)
class Manylora:
    """This project."""

    files: Files
    quantization: str
    name: str = OURS
    base_apart: bool = False

    def version(self) -> str:
        """See Peer."""
        here = environment()
        versions = here["versions"]
        assert isinstance(versions, dict)
        return f"{versions.get('manylora')}, commit {here['commit'] or 'unknown'}"

    @contextmanager
    def start(self, *, adapters: bool) -> Iterator[Started]:
        """See Peer. The adapters are always there."""
        try:
            with serving(self.files, self.quantization) as server:
                listed = httpx.get(f"{server.url}/v1/models").json()["data"]
                base = next(model["id"] for model in listed if not model.get("parent"))
                names = tuple(path.name for path in self.files.adapters)
                yield Started(server.url, "openai", base, names, _banner(server.log))
        except CompareError as error:
            raise PeerError(str(error)) from None


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """llama.cpp's server."""

    server: Path
    files: GgufFiles
    scratch: Path
    streams: int
    context: int
    """Tokens of a stream."""
    threads: int
    name: str = LLAMA
    base_apart: bool = True

    def version(self) -> str:
        """See Peer."""
        done = _said([str(self.server), "--version"])
        found = re.search(r"version:\s*(.+)", done)
        return (
            found[1].strip() if found else done.strip().splitlines()[0][:100] if done.strip() else "unknown"
        )

    @contextmanager
    def start(self, *, adapters: bool) -> Iterator[Started]:
        """See Peer."""
        port, slots = free_port(), self.streams
        line = [str(self.server), "-m", str(self.files.base), "--host", "127.0.0.1", "--port", str(port)]
        line += [
            "-np",
            str(slots),
            "-c",
            str(slots * (self.context + ROOM)),
            "-fa",
            "on",
            "-t",
            str(self.threads),
        ]
        if adapters:
            line += ["--lora", ",".join(map(str, self.files.adapters)), "--lora-init-without-apply"]
        process = start_line(line, os.environ, port, self.scratch / "llama.cpp", "/health")
        with _until_ready(process, self.name):
            names = tuple(path.stem for path in self.files.adapters) if adapters else ()
            yield Started(process.url, "llama.cpp", "base", names, self._features() or "unknown")

    def _features(self) -> str:
        """Return what it is built for and finds: told to who asks for more, before it sees that there is no model."""
        found = _SYSTEM.search(_said([str(self.server), "-lv", "4", "-m", os.devnull]))
        return " ".join(re.findall(r"(\w+) = 1", found[1])) if found else ""


@dataclass(frozen=True, slots=True)
class Vllm:
    """vLLM's OpenAI server."""

    python: Path
    files: Files
    scratch: Path
    context: int
    cores: Sequence[int]
    name: str = VLLM
    base_apart: bool = True

    def version(self) -> str:
        """See Peer."""
        code = (
            "import torch, vllm; print(vllm.__version__, 'torch', torch.__version__,"
            " torch.backends.cpu.get_cpu_capability(), sep='|')"
        )
        said = _said([str(self.python), "-c", code]).strip().splitlines()
        if not said or said[-1].count("|") != 3:
            raise PeerError(f"{self.python} can't import vllm: {said[-1] if said else 'it says nothing'}")
        return said[-1].replace("|", " ")

    @contextmanager
    def start(self, *, adapters: bool) -> Iterator[Started]:
        """See Peer."""
        port, some = free_port(), self.files.adapters[:VLLM_MOST_ADAPTERS]
        line = [str(self.python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.files.base)]
        line += ["--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port)]
        line += [
            "--dtype",
            "bfloat16",
            "--no-enable-prefix-caching",
            "--max-model-len",
            str(self.context + ROOM),
        ]
        if adapters:
            line += [
                "--enable-lora",
                "--max-loras",
                str(len(some)),
                "--max-lora-rank",
                "16",
                "--lora-modules",
            ]
            line += [f"{path.name}={path}" for path in some]
        bound = f"{self.cores[0]}-{self.cores[-1]}" if len(self.cores) > 1 else str(self.cores[0])
        told = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": bound, **os.environ}
        process = start_line(line, told, port, self.scratch / "vllm", "/health")
        with _until_ready(process, self.name):
            names = tuple(path.name for path in some) if adapters else ()
            yield Started(process.url, "vllm", "base", names, self.version().rsplit(" ", 1)[-1])


@contextmanager
def _until_ready(process: ServerProcess, name: str) -> Iterator[None]:
    try:
        with running(process, start_seconds=START_SECONDS):
            yield
    except RuntimeError as error:
        if process.process.returncode is None:
            raise
        last = str(error).strip().splitlines()[-1]
        raise PeerError(f"{name} did not start: {last}") from None


def _banner(log: Path) -> str:
    """Return what manylora's first lines say of its kernels."""
    found = re.search(r"native \w+, .*?threads: \d+", log.read_text(errors="replace"))
    return found[0] if found else "plain torch"


def _said(line: Sequence[str]) -> str:
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerError(f"{line[0]} can't be run: {error}") from None
    return done.stdout + done.stderr


def peft_version() -> str | None:
    """Return peft's version with torch's instruction set; None where it is not installed."""
    code = "import peft, torch; print(peft.__version__, torch.backends.cpu.get_cpu_capability())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return said.stdout.strip() if said.returncode == 0 else None
