"""How fast mixtures are: `python -m manylora.loadtest.checks.mixture_speed`. Exit status 1 under 90 %.

Serves a random checkpoint with eight adapters of rank 32 and sixteen of rank 16 on all linear layers, and asks it, by
turns and through HTTP, for the eight (`bench serve --distribution distinct`) and for eight mixtures of two of the
sixteen (`--distribution mixture`): as many rank rows for each stream. Prints both and the ratio of each round.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from manylora.loadtest.bench.beside_peft import CompareError, Files, bench, serving, speed
from manylora.loadtest.bench.popularity import MIXTURE
from manylora.loadtest.material.checkpoints import ALL_LINEAR, SHAPES, AdapterShape, write_adapter, write_base
from manylora.loadtest.material.environment import environment, headline
from manylora.loadtest.material.text_table import text_table

BAR = 0.9
"""Of what single adapters of twice the rank reach."""
KINDS = ("distinct", MIXTURE)


def write_files(scratch: Path, model: str, streams: int, rank: int) -> tuple[Files, dict[str, str]]:
    """Write a base and its adapters; return them, and which adapters each kind asks for."""
    base = write_base(scratch / "base", SHAPES[model], dtype=torch.bfloat16)
    names = {
        "distinct": [f"whole{number}" for number in range(streams)],
        MIXTURE: [f"half{number}" for number in range(2 * streams)],
    }
    ranks = {"distinct": 2 * rank, MIXTURE: rank}
    paths = [
        write_adapter(
            scratch / name,
            base,
            AdapterShape(ranks[kind], 2.0 * ranks[kind], ALL_LINEAR, seed),
            dtype=torch.bfloat16,
        )
        for kind in KINDS
        for seed, name in enumerate(names[kind])
    ]
    return Files(base, tuple(paths), scratch), {kind: ",".join(found) for kind, found in names.items()}


def measure(
    options: argparse.Namespace, files: Files, names: dict[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """Return the reports of `bench serve`, by kind, one for each round."""
    sizes = [
        "--input",
        str(options.input),
        "--output",
        str(options.output),
        "--streams",
        str(options.streams),
    ]
    sizes += ["--requests", str(options.requests or 2 * options.streams)]
    reports: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    with serving(files, options.quantization) as server:
        for number in range(options.rounds):
            # They take turns in going first.
            for kind in KINDS if number % 2 else reversed(KINDS):
                asked = ["--url", server.url, "--adapters", names[kind], "--distribution", kind, *sizes]
                report = bench(files.scratch, "serve", *asked)
                if report["errors"]:
                    raise CompareError(f"{kind}: {report['errors']}")
                reports[kind].append(report)
    return reports


def main() -> int:
    """Measure and print; 1 if the bar is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="qwen2.5-0.5b", choices=list(SHAPES))
    parser.add_argument("--quantization", default="nf4", choices=["none", "nf4"])
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16, help="of each part; single adapters have twice that")
    parser.add_argument("--input", type=int, default=64)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=0, help="of each round; 0: two for each stream")
    parser.add_argument("--scratch", type=Path, help="where to write some 1.5 GB; else the system's own")
    parser.add_argument("--json", type=Path, help="write the report here")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="manylora-mixtures-", dir=options.scratch) as scratch:
            written = write_files(Path(scratch), options.model, options.streams, options.rank)
            reports = measure(options, *written)
    except (CompareError, ValueError, OSError) as error:
        sys.exit(f"manylora.loadtest.checks.mixture_speed: {error}")
    return report_on(options, reports)


def report_on(options: argparse.Namespace, reports: dict[str, list[dict[str, Any]]]) -> int:
    """Print the figures and return the exit status."""
    speeds = {kind: [speed(report) for report in found] for kind, found in reports.items()}
    ratios = [a / b for a, b in zip(speeds[MIXTURE], speeds["distinct"], strict=True)]
    ratio, streams = statistics.median(ratios), options.streams
    rows = [
        [
            f"{streams} adapters of rank {2 * options.rank}",
            f"{statistics.median(speeds['distinct']):.1f}",
            "",
        ],
        [
            f"{streams} mixtures of two of rank {options.rank}",
            f"{statistics.median(speeds[MIXTURE]):.1f}",
            f"{ratio:.3f} of that",
        ],
    ]
    print(headline(), end="\n\n")  # noqa: T201  # the result
    print(text_table(["tokens/s, medians", f"{options.model}, {options.quantization}", ""], rows))  # noqa: T201  # the result
    met = ratio >= BAR
    shown = ", ".join(f"{each:.3f}" for each in ratios)
    print(f"\nratios of the rounds: {shown}; bar ≥ {BAR:g}: {'met' if met else 'missed'}")  # noqa: T201  # the result
    if options.json is not None:
        written = {"environment": environment(), "ratio": ratio, "ratios": ratios, "reports": reports}
        options.json.write_text(json.dumps(written, indent=2) + "\n")
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
