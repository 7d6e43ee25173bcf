"""`make bench`: manylora beside transformers + peft (+ bitsandbytes), on the same files, one after the other.

A random checkpoint of Qwen2.5-0.5B's shape and eight adapters are written to a scratch directory. For each weight
format `manylora serve` answers 8 streams with 8 adapters through HTTP, then, while it is idle, the same batch runs in
peft; each is a process of its own. Last, the engine's overhead at 32 streams. Run it with
``python -m manylora.loadtest.bench.beside_peft``; it needs nothing but what `make bench` installs.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manylora.loadtest.material.checkpoints import ALL_LINEAR, SHAPES, AdapterShape, write_adapter, write_base
from manylora.loadtest.material.environment import environment, headline
from manylora.loadtest.material.server_process import (
    ServerProcess,
    command,
    environment_of_children,
    running,
    start_server,
)
from manylora.loadtest.material.text_table import milliseconds, text_table

BARS = {"none": 2.0, "nf4": 1.5}
"""How many times peft's tokens/s we are to reach, by quantization."""
MOST_OVERHEAD = 0.10
"""Of a decode step at 32 streams, top_p on."""
POOLS = ["--kv-cache-gib", "1", "--arena-rows", "1024"]
"""Room enough for the load, not a share of the free memory: peft's process needs that while the server waits."""
BUSY_SAMPLING = ["--temperature", "0.8", "--top-p", "0.9"]
NAMES = {"none": "bfloat16", "nf4": "NF4"}
START_SECONDS, END_SECONDS = 600.0, 60.0
"""Longer than the bars wait: the model is larger."""


class CompareError(Exception):
    """The comparison can't go on. One line."""


@dataclass(frozen=True, slots=True)
class Files:
    """What both sides load."""

    base: Path
    adapters: tuple[Path, ...]
    scratch: Path


@dataclass(frozen=True, slots=True)
class Compared:
    """One weight format's reports, a pair for each round: `bench serve` and `bench peft` right after it."""

    quantization: str
    ours: list[dict[str, Any]]
    theirs: list[dict[str, Any]]

    @property
    def ratios(self) -> list[float]:
        """Our tokens/s by theirs, of each round."""
        return [speed(a) / speed(b) for a, b in zip(self.ours, self.theirs, strict=True)]

    @property
    def ratio(self) -> float:
        """The rounds' median."""
        return statistics.median(self.ratios)

    def row(self) -> list[str]:
        """Return the table's row: medians of the rounds."""
        bar = BARS[self.quantization]
        tokens = [statistics.median(map(speed, reports)) for reports in (self.ours, self.theirs)]
        times = [
            statistics.median(report[name]["p50"] or math.nan for report in self.ours)
            for name in ("first_token_seconds", "between_tokens_seconds")
        ]
        return [
            NAMES[self.quantization],
            *(f"{each:.1f}" for each in tokens),
            f"{self.ratio:.2f} ×",
            f"≥ {bar:g} ×",
            "met" if self.ratio >= bar else "missed",
            *map(milliseconds, times),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return ratios and reports as JSON values."""
        return {
            "quantization": self.quantization,
            "ratio": self.ratio,
            "ratios": self.ratios,
            "serve": self.ours,
            "peft": self.theirs,
        }


def speed(report: dict[str, Any]) -> float:
    """Return a report's output tokens a second."""
    return float(report["tokens_per_second"])


def write_files(scratch: Path, model: str, adapters: int, rank: int, tokenizer: Path | None) -> Files:
    """Write the checkpoint and its adapters."""
    base = write_base(scratch / "base", SHAPES[model], dtype=torch.bfloat16, tokenizer=tokenizer)
    shapes = [AdapterShape(rank, 2.0 * rank, ALL_LINEAR, seed) for seed in range(adapters)]
    written = [
        write_adapter(scratch / f"adapter{number}", base, shape, dtype=torch.bfloat16)
        for number, shape in enumerate(shapes)
    ]
    return Files(base, tuple(written), scratch)


@contextmanager
def serving(files: Files, quantization: str) -> Iterator[ServerProcess]:
    """Run `manylora serve` on the files until the block ends. Raises CompareError if it can't start."""
    arguments = ["--quantization", quantization, "--dtype", "bfloat16", *POOLS]
    arguments += ["--adapter-root", str(files.scratch)]
    for path in files.adapters:
        arguments += ["--adapter", f"{path.name}={path}"]
    server = start_server(files.base, files.scratch / f"serve-{quantization}", arguments)
    with ExitStack() as until_the_end:
        try:
            until_the_end.enter_context(running(server, start_seconds=START_SECONDS, end_seconds=END_SECONDS))
        except RuntimeError as error:
            last = str(error).strip().splitlines()[-1]
            raise CompareError(f"manylora serve did not start: {last}") from None
        yield server


def bench(scratch: Path, *arguments: str) -> dict[str, Any]:
    """Run a `manylora bench` in a process of its own and return its report. Raises CompareError if it fails."""
    report = scratch / "report.json"
    line = command("bench", *arguments, "--json", str(report))
    done = subprocess.run(line, env=environment_of_children(), capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"
        raise CompareError(f"manylora bench {arguments[0]} failed: {said}")
    loaded: dict[str, Any] = json.loads(report.read_text())
    return loaded


def compare(options: argparse.Namespace, files: Files) -> dict[str, Any]:
    """Measure everything; print each table when it is there; return the report."""
    lengths = ["--input", str(options.input), "--output", str(options.output)]
    sizes = [*lengths, "--streams", str(options.streams)]
    sizes += ["--requests", str(options.requests or 4 * options.streams)]
    adapters = [part for path in files.adapters for part in ("--adapter", str(path))]
    busy = [*lengths, *BUSY_SAMPLING, "--streams", str(options.busy_streams), "--popularity", "uniform"]
    busy += ["--requests", str(2 * options.busy_streams)]
    compared, through_http, loop_share = [], {}, 0.0
    for quantization in options.quantization:
        shared = ["--model", str(files.base), "--quantization", quantization]
        pair = Compared(quantization, [], [])
        with serving(files, quantization) as server:
            before = server.event_loop_seconds()
            through_http = bench(files.scratch, "serve", "--url", server.url, *busy)
            # Of the counted seconds; the warm-up's requests are in it, so it is an upper bound.
            loop_share = (server.event_loop_seconds() - before) / through_http["seconds"]
            for _ in range(options.rounds):
                # By turns: what else the machine does then meets both.
                asked = ["--url", server.url, "--popularity", "distinct", *sizes]
                pair.ours.append(bench(files.scratch, "serve", *asked))
                pair.theirs.append(bench(files.scratch, "peft", *shared, *adapters, *sizes))
        compared.append(pair)
    print_compared(options, compared)
    ranks = ["--adapters", str(options.adapters), "--rank", str(options.rank)]
    engine = bench(files.scratch, "engine", *shared, *ranks, *busy)
    print_overhead(engine, through_http, loop_share)
    return {
        "bench": "compare",
        "environment": environment(),
        "compared": [each.to_json() for each in compared],
        "engine": engine,
        "busy_serve": through_http,
        "busy_event_loop_share": loop_share,
    }


def print_compared(options: argparse.Namespace, compared: list[Compared]) -> None:
    """Print the comparison."""
    head = ["weights", "manylora", "peft", "ratio", "bar", "", "first token ms", "between tokens ms"]
    print(f"tokens/s, {options.streams} streams with {options.adapters} adapters of rank {options.rank} on")  # noqa: T201  # the result
    print(f"{options.model}, prompts of {options.input} and answers of {options.output} tokens, greedy")  # noqa: T201  # the result
    print(headline(), end="\n\n")  # noqa: T201  # the result
    print(text_table(head, [each.row() for each in compared]), end="\n\n")  # noqa: T201  # the result
    print("manylora: through HTTP, streamed, client on the same cores")  # noqa: T201  # the result
    print(f"peft: {compared[-1].theirs[0]['how']}")  # noqa: T201  # the result
    for each in compared:
        name = NAMES[each.quantization]
        if len(each.ratios) > 1:
            print(f"{name}: ratios of the rounds {', '.join(f'{r:.2f}' for r in each.ratios)}")  # noqa: T201  # the result
        for report in each.ours:
            if report["load_client"]["is_the_limit"]:
                print(f"{name}: client is the limit: {report['load_client']['is_the_limit']}")  # noqa: T201  # the result
            if report["errors"]:
                print(f"{name}: errors: {report['errors']}")  # noqa: T201  # the result


def print_overhead(engine: dict[str, Any], through_http: dict[str, Any], loop_share: float) -> None:
    """Print where a decode step goes, the share that isn't kernels, and what HTTP leaves of the engine's speed."""
    settings, steps = engine["settings"], engine["decode_steps"]
    parts = steps["mean_seconds"]
    whole = sum(parts.values())
    rows = [[name, milliseconds(each), f"{100 * each / whole:.1f} %"] for name, each in parts.items()]
    streams, held = settings["workload"]["streams"], NAMES[settings["model"]["quantization"]]
    sampled = f"temperature {settings['temperature']}, top_p {settings['top_p']}"
    print(f"\na decode step of {streams} streams, {held}, {sampled}\n")  # noqa: T201  # the result
    print(text_table(["part", "mean ms", "share"], rows), end="\n\n")  # noqa: T201  # the result
    verdict = "met" if steps["overhead"] <= MOST_OVERHEAD else "missed"
    print(f"overhead {100 * steps['overhead']:.1f} %, bar ≤ {100 * MOST_OVERHEAD:.0f} %: {verdict}")  # noqa: T201  # the result
    print(f"the server's event loop (HTTP, JSON, SSE) took {100 * loop_share:.1f} % of the time beside that")  # noqa: T201  # the result
    alone, served = engine["tokens_per_second"], through_http["tokens_per_second"]
    print(  # noqa: T201  # the result
        f"{alone:.1f} tokens/s without HTTP, {served:.1f} through it, client on the same cores: "
        f"{100 * (1 - served / alone):.1f} % less"
    )


def main() -> None:
    """Parse, write the files, compare, remove them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="qwen2.5-0.5b", choices=list(SHAPES))
    parser.add_argument("--quantization", nargs="+", default=["none", "nf4"], choices=list(BARS))
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--busy-streams", type=int, default=32, help="streams at which overhead is measured")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--input", type=int, default=64)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1, help="times that each side is measured, by turns")
    parser.add_argument("--requests", type=int, default=0, help="0: four for each stream")
    parser.add_argument("--tokenizer", type=Path, help="directory of a real tokenizer; else one is made")
    parser.add_argument("--scratch", type=Path, help="where to write some 1.5 GB; else the system's own")
    parser.add_argument("--json", type=Path, help="write the report here")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="manylora-bench-", dir=options.scratch) as scratch:
            files = write_files(
                Path(scratch), options.model, options.adapters, options.rank, options.tokenizer
            )
            report = compare(options, files)
    except (CompareError, ValueError, OSError) as error:
        sys.exit(f"manylora.loadtest.bench.beside_peft: {error}")
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
