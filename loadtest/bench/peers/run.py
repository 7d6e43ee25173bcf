"""Runs the scenes: one peer's server at a time, the same client for all, each measurement a process of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from manylora.loadtest.bench.beside_peft import CompareError, Files, bench
from manylora.loadtest.bench.peers.files import PeerError
from manylora.loadtest.bench.peers.scenes import PEFT, Measured, Scene
from manylora.loadtest.bench.peers.servers import Peer, Started


@dataclass(frozen=True, slots=True)
class Peers:
    """What is measured, and how long."""

    servers: tuple[Peer, ...]
    files: Files
    scenes: tuple[Scene, ...]
    quantization: str
    each: int
    """Requests of each stream that count."""
    with_peft: bool


@dataclass(slots=True)
class Ran:
    """What came out."""

    results: dict[tuple[str, str], Measured]
    versions: dict[str, str]
    failed: dict[str, str]
    """Peers that couldn't be measured to the end, and why."""


def run_peers(peers: Peers, tell: Callable[[str], None]) -> Ran:
    """Measure all. A peer that fails is told and left out; the others go on."""
    ran = Ran({}, {}, {})
    for peer in peers.servers:
        try:
            ran.versions[peer.name] = peer.version()
            asked = [scene for scene in peers.scenes if peer.name in scene.peers]
            for adapters in (False, True) if peer.base_apart else (True,):
                scenes = [scene for scene in asked if _runs_in(scene, peer, adapters)]
                if scenes:
                    _run_server(peer, adapters, scenes, peers, ran, tell)
        except (PeerError, CompareError) as error:
            ran.failed[peer.name] = str(error)
            tell(f"{peer.name}: {error}")
    if peers.with_peft:
        _run_peft(peers, ran, tell)
    return ran


def _runs_in(scene: Scene, peer: Peer, adapters: bool) -> bool:
    return not peer.base_apart or (scene.models != "base") == adapters


def _run_server(
    peer: Peer,
    adapters: bool,  # which of its two forms is started
    scenes: Sequence[Scene],
    peers: Peers,
    ran: Ran,
    tell: Callable[[str], None],
) -> None:
    with peer.start(adapters=adapters) as started:
        ran.versions[peer.name] = f"{peer.version()}; computes with {started.built_for}"
        for scene in scenes:
            tell(f"{peer.name}: {scene.name}")
            report = bench(peers.files.scratch, "serve", *serve_words(scene, started, peers.each))
            ran.results[peer.name, scene.name] = Measured.of_serve(report, scene.streams)


def serve_words(scene: Scene, started: Started, each: int) -> list[str]:
    """Return the words of the `bench serve` that measures a scene. Raises PeerError for too few adapters."""
    wanted = {"base": 0, "one": 1, "own": scene.streams}[scene.models]
    if len(started.adapters) < wanted:
        raise PeerError(f"{scene.name} needs {wanted} adapters, the server has {len(started.adapters)}")
    models = started.adapters[:wanted] or (started.base,)
    return [
        *("--url", started.url, "--server", started.kind, "--adapters", ",".join(models)),
        *("--streams", str(scene.streams), "--popularity", "distinct"),
        *("--requests", str(each * scene.streams), "--warmup", str(scene.streams)),
        *("--input", str(scene.input_tokens), "--output", str(scene.output_tokens), "--timeout", "900"),
    ]


def _run_peft(peers: Peers, ran: Ran, tell: Callable[[str], None]) -> None:
    for scene in (scene for scene in peers.scenes if PEFT in scene.peers):
        tell(f"{PEFT}: {scene.name}")
        used = {"base": 0, "one": 1, "own": scene.streams}[scene.models]
        words = ["--model", str(peers.files.base), "--quantization", peers.quantization, "--adapters", "0"]
        words += [part for path in peers.files.adapters[:used] for part in ("--adapter", str(path))]
        words += ["--streams", str(scene.streams), "--requests", str(scene.streams)]
        words += ["--input", str(scene.input_tokens), "--output", str(scene.output_tokens)]
        try:
            report = bench(peers.files.scratch, "peft", *words)
        except CompareError as error:
            ran.failed[PEFT] = str(error)
            tell(f"{PEFT}: {error}")
            return
        ran.results[PEFT, scene.name] = Measured.of_peft(report, scene.streams)


def scratch_is_ours(scratch: Path) -> bool:
    """Whether files of an earlier run lie in ``scratch``."""
    return (scratch / "base" / "config.json").is_file()
