"""What nine adapters get beside one that ten times as many ask for: `python -m manylora.loadtest.checks.fair`.

A server with a random base in NF4 and ten adapters has fewer places than streams ask, so that requests for each adapter
wait at any time. In turn all ten have as many streams, and one of them ten times as many. Of each of the other nine
it is told what it gets of a tenth of all tokens while the one is busy; of all nine what they get of what they had while
it was not. Exit status 1 if one of these is under 90 %.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from manylora.loadtest.material.checkpoints import ALL_LINEAR, SHAPES, AdapterShape, write_adapter, write_base
from manylora.loadtest.material.environment import environment, headline
from manylora.loadtest.material.server_process import running, start_server
from manylora.loadtest.material.standing_load import Refused, StandingLoad
from manylora.loadtest.material.text_table import text_table

BAR = 0.9
OTHERS = 9
BUSY = "busy"
TIMES = 10
"""As many streams as each of the others has."""


async def measure(options: argparse.Namespace, url: str) -> dict[str, list[tuple[float, Counter[str]]]]:
    """Return, for each round of an even and of a busy time, its seconds and each model's tokens."""
    load = StandingLoad(url, options.input, options.output)
    others = [f"other{number}" for number in range(OTHERS)]
    found: dict[str, list[tuple[float, Counter[str]]]] = {"even": [], BUSY: []}
    async with load.running([*others, BUSY] * options.streams):
        for number in range(options.rounds):
            for kind in ("even", BUSY) if number % 2 else (BUSY, "even"):
                more = [BUSY] * ((TIMES - 1) * options.streams if kind == BUSY else 0)
                async with load.running(more):
                    await load.until(options.tokens // 4)
                    start = time.perf_counter()
                    await load.until(options.tokens)
                    end = time.perf_counter()
                found[kind].append((end - start, load.tokens(start, end)))
    return found


def report_on(options: argparse.Namespace, found: dict[str, list[tuple[float, Counter[str]]]]) -> int:
    """Print the figures and return the exit status."""
    rates = {
        kind: {
            model: sum(tokens[model] for _, tokens in rounds) / sum(seconds for seconds, _ in rounds)
            for model in [BUSY, *(f"other{number}" for number in range(OTHERS))]
        }
        for kind, rounds in found.items()
    }
    fair = sum(rates[BUSY].values()) / (OTHERS + 1)
    rows = [
        [model, f"{rates['even'][model]:.1f}", f"{rate:.1f}", f"{rate / fair:.3f}"]
        for model, rate in rates[BUSY].items()
    ]
    shares = [rate / fair for model, rate in rates[BUSY].items() if model != BUSY]
    kept = sum(r for m, r in rates[BUSY].items() if m != BUSY) / sum(
        r for m, r in rates["even"].items() if m != BUSY
    )
    head = ["tokens/s", "all the same", f"one at {TIMES} ×", "of a tenth of all"]
    print(headline(), end="\n\n")  # noqa: T201  # the result
    print(text_table(head, rows))  # noqa: T201  # the result
    met = min(shares) >= BAR and kept >= BAR
    print(  # noqa: T201  # the result
        f"\nthe nine: {min(shares):.3f} of a fair share at least, {statistics.median(shares):.3f} in the middle; "
        f"together {kept:.3f} of what they have while all ask the same; "
        f"bar ≥ {BAR:g} each: {'met' if met else 'missed'}"
    )
    if options.json is not None:
        told = {"environment": environment(), "rates": rates, "shares": shares, "kept": kept}
        options.json.write_text(json.dumps(told, indent=2) + "\n")
    return int(not met)


def run(options: argparse.Namespace, scratch: Path) -> int:
    """Serve, measure, report."""
    base = write_base(scratch / "base", SHAPES[options.model], dtype=torch.bfloat16)
    names = [BUSY, *(f"other{number}" for number in range(OTHERS))]
    arguments = ["--quantization", options.quantization, "--dtype", "bfloat16", "--kv-cache-gib", "0.5"]
    arguments += ["--arena-rows", str(options.rank * len(names)), "--max-running", str(options.places)]
    if options.threads:
        arguments += ["--threads", str(options.threads)]
    for seed, name in enumerate(names):
        shape = AdapterShape(options.rank, 2.0 * options.rank, ALL_LINEAR, seed)
        path = write_adapter(scratch / name, base, shape, dtype=torch.bfloat16)
        arguments += ["--adapter", f"{name}={path}"]
    server = start_server(base, scratch / "server", arguments)
    with running(server, start_seconds=600):
        return report_on(options, asyncio.run(measure(options, server.url)))


def main() -> int:
    """Measure and print; 1 if the bar is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m manylora.loadtest.checks.fair",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default="qwen2.5-0.5b", choices=list(SHAPES))
    parser.add_argument("--quantization", default="nf4", choices=["none", "nf4"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--places", type=int, default=16, help="sequences that run at once")
    parser.add_argument("--streams", type=int, default=4, help="of each adapter that isn't busy")
    parser.add_argument("--input", type=int, default=16)
    parser.add_argument("--output", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=5000, help="of each time; a quarter of it comes before")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="of the server; 0: its own choice")
    parser.add_argument("--scratch", type=Path, help="where to write some 1.2 GB; else the system's own")
    parser.add_argument("--json", type=Path, help="write the report here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="manylora-fair-", dir=options.scratch) as scratch:
        try:
            return run(options, Path(scratch))
        except (Refused, RuntimeError, OSError) as error:
            sys.exit(f"manylora.loadtest.checks.fair: {error}")


if __name__ == "__main__":
    sys.exit(main())
