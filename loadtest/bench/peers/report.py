"""What a run of peers found, for people and as JSON."""

from dataclasses import asdict

from manylora.loadtest.bench.peers.run import Peers, Ran
from manylora.loadtest.bench.peers.scenes import BARS, OURS, PEERS, PEFT, bars_table, figures_table
from manylora.loadtest.bench.peers.servers import peft_version
from manylora.loadtest.material.environment import environment, headline


def peers_text(setting: Peers, ran: Ran) -> str:
    """Return versions, figures and bars."""
    peers = tuple(name for name in PEERS if any(peer == name for peer, _ in ran.results))
    versions = [f"{name}: {said}" for name, said in ran.versions.items()]
    if PEFT in peers:
        versions.append(f"{PEFT}: {peft_version()}")
    parts = [headline() + "\n" + "\n".join(versions), figures_table(ran.results, peers, setting.scenes)]
    parts.append(bars_table(ran.results))
    parts += [f"{name} was not measured to the end: {why}" for name, why in ran.failed.items()]
    failed = [
        f"{measured.errors} requests of {peer} failed in {scene}"
        for (peer, scene), measured in ran.results.items()
        if measured.errors
    ]
    return "\n\n".join([*parts, *failed])


def peers_json(setting: Peers, ran: Ran) -> dict[str, object]:
    """Return everything as JSON values."""
    return {
        "bench": "peers",
        "settings": {"quantization": setting.quantization, "requests_each": setting.each},
        "environment": environment(),
        "versions": ran.versions,
        "failed": ran.failed,
        "results": [
            {
                "peer": peer,
                "scene": scene,
                **{name: None if value != value else value for name, value in asdict(measured).items()},
            }
            for (peer, scene), measured in ran.results.items()
        ],
        "bars": [
            {
                "scene": bar.scene,
                "figure": bar.figure,
                "ratio": None if ratio != ratio else ratio,
                "limit": bar.limit,
                "met": None if ratio != ratio else bar.met(ratio),
            }
            for bar, ratio in ((bar, bar.ratio(ran.results)) for bar in BARS)
            if (OURS, bar.scene) in ran.results
        ],
    }
