"""Puts a run of peers together: files, servers, scenes."""

import os
from pathlib import Path

from manylora.loadtest.bench.beside_peft import Files, write_files
from manylora.loadtest.bench.peers.files import PeerError, convert
from manylora.loadtest.bench.peers.run import Peers, scratch_is_ours
from manylora.loadtest.bench.peers.scenes import LLAMA, SCENES, Scene
from manylora.loadtest.bench.peers.servers import LlamaCpp, Manylora, Peer, Vllm, peft_version
from manylora.loadtest.bench.peers.wanted import Wanted
from manylora.loadtest.material.checkpoints import SHAPES

RANK = 16


def assemble(
    wanted: Wanted, scratch: Path, model: tuple[str, str, Path | None], each: int, threads: int
) -> Peers:
    """Write the files and return the run. ``model``: shape, quantization, tokenizer. Raises PeerError, ValueError."""
    shape, quantization, tokenizer = model
    if shape not in SHAPES:
        raise ValueError(f"--model {shape}: there are {', '.join(SHAPES)}")
    scenes = _scenes(wanted.scenes)
    cores = (
        sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [*range(os.cpu_count() or 1)]
    )
    adapters = max((scene.streams if scene.models == "own" else 1 for scene in scenes), default=1)
    files = _files(scratch, shape, adapters, tokenizer)
    context = max(scene.input_tokens + scene.output_tokens for scene in scenes)
    servers: list[Peer] = [Manylora(files, quantization)]
    if wanted.llama_server is not None and wanted.llama_source is not None:
        used = [scene for scene in scenes if LLAMA in scene.peers]
        streams = max((scene.streams for scene in used), default=1)
        some = Files(files.base, files.adapters[:streams], files.scratch)
        gguf = convert(some, wanted.llama_server, wanted.llama_source, wanted.llama_python, scratch)
        servers.append(LlamaCpp(wanted.llama_server, gguf, scratch, streams, context, threads or len(cores)))
    if wanted.vllm is not None:
        servers.append(Vllm(wanted.vllm, files, scratch, context, cores))
    return Peers(
        tuple(servers), files, scenes, quantization, each, wanted.peft and peft_version() is not None
    )


def _scenes(names: tuple[str, ...]) -> tuple[Scene, ...]:
    by_name = {scene.name: scene for scene in SCENES}
    for name in names:
        if name not in by_name:
            raise ValueError(f"--scene {name!r}: there are {'; '.join(by_name)}")
    return tuple(scene for scene in SCENES if not names or scene.name in names)


def _files(scratch: Path, shape: str, adapters: int, tokenizer: Path | None) -> Files:
    if not scratch_is_ours(scratch):
        return write_files(scratch, shape, adapters, RANK, tokenizer)
    found = sorted(scratch.glob("adapter*/adapter_config.json"), key=lambda path: int(path.parent.name[7:]))
    if len(found) < adapters:
        raise PeerError(
            f"{scratch} holds {len(found)} adapters and {adapters} are needed: give another --keep"
        )
    return Files(scratch / "base", tuple(path.parent for path in found[:adapters]), scratch)
