"""The server of checks.tiers, the files that it is given, and what is found out about it."""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from manylora.loadtest.material.checkpoints import ALL_LINEAR, SHAPES, AdapterShape, write_adapter, write_base
from manylora.loadtest.material.server_process import ServerProcess, running, start_server

START_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    what: str
    found: str
    bar: str = ""
    met: bool | None = None
    """None: it is only told."""

    @property
    def verdict(self) -> str:
        """What to print of it."""
        return {None: "", True: "met", False: "missed"}[self.met]

    def to_json(self) -> dict[str, object]:
        """Return JSON values."""
        return asdict(self)


class House:
    """A base, adapters of noise, and a server with room for some of them."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options = options
        self.scratch = scratch
        self.base = write_base(scratch / "base", SHAPES[options.model], dtype=torch.bfloat16)

    def adapter(self, name: str, seed: int) -> str:
        """Write an adapter; return its directory as the server is told it."""
        rank = self.options.rank
        shape = AdapterShape(rank, 2.0 * rank, ALL_LINEAR, seed)
        return str(write_adapter(self.scratch / name, self.base, shape, dtype=torch.bfloat16))

    def twin(self, name: str, source: str, number: int) -> str:
        """Write an adapter of the same weights that is another one by its config: the file of weights is shared."""
        directory = self.scratch / name
        directory.mkdir()
        os.link(Path(source) / "adapter_model.safetensors", directory / "adapter_model.safetensors")
        config = json.loads((Path(source) / "adapter_config.json").read_text())
        config["revision"] = f"twin {number}"
        (directory / "adapter_config.json").write_text(json.dumps(config))
        return str(directory)

    @contextmanager
    def serving(
        self, device: int, host_gib: float, adapters: Sequence[tuple[str, str]]
    ) -> Iterator[ServerProcess]:
        """Serve with room for ``device`` adapters in the arena; ``adapters`` are (name, directory)."""
        options = self.options
        arguments = ["--quantization", options.quantization, "--dtype", "bfloat16", "--kv-cache-gib", "0.5"]
        arguments += ["--arena-rows", str(options.rank * device), "--host-cache-gib", str(host_gib)]
        arguments += ["--adapter-root", str(self.scratch)]
        if options.threads:
            arguments += ["--threads", str(options.threads)]
        for name, directory in adapters:
            arguments += ["--adapter", f"{name}={directory}"]
        server = start_server(self.base, self.scratch / "server", arguments)
        with running(server, start_seconds=START_SECONDS):
            yield server
