"""What moving adapters between disk, host and device costs: `python -m manylora.loadtest.checks.tiers`.

A server with a random base in NF4 has room for few adapters on the device and little on the host. Three questions, and
exit status 1 if one of the answers is no:

loads    While new versions are put into the arena that nobody waits for, do running streams keep 90 % of their speed,
         and is no gap between two tokens over three times the median?
cold     Does the first token of an adapter that is on disk come at most 100 ms later than that of one on the device?
zipf     With a thousand adapters asked for in Zipf's order and room for 32, is the throughput at least 85 % of that
         with eight?
"""

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path

from manylora.loadtest.checks.tiers_house import Finding, House
from manylora.loadtest.checks.tiers_parts import cold, loads, zipf
from manylora.loadtest.material.checkpoints import SHAPES
from manylora.loadtest.material.environment import environment, headline
from manylora.loadtest.material.standing_load import Refused
from manylora.loadtest.material.text_table import text_table

PARTS: dict[str, Callable[[House], Coroutine[None, None, list[Finding]]]] = {
    "loads": loads,
    "cold": cold,
    "zipf": zipf,
}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m manylora.loadtest.checks.tiers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="which questions; none: all")
    parser.add_argument("--model", default="qwen2.5-0.5b", choices=list(SHAPES))
    parser.add_argument("--quantization", default="nf4", choices=["none", "nf4"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--loads", type=int, default=20, help="versions that are put beside streams")
    parser.add_argument("--asked", type=int, default=12, help="adapters whose first tokens are timed")
    parser.add_argument("--adapters", type=int, default=1000, help="of zipf")
    parser.add_argument("--requests", type=int, default=120, help="of each round of zipf")
    parser.add_argument("--rounds", type=int, default=3, help="of zipf, each of few and of many adapters")
    parser.add_argument("--threads", type=int, default=0, help="of the server; 0: its own choice")
    parser.add_argument(
        "--scratch", type=Path, help="where to write some 20 GB for zipf; else the system's own"
    )
    parser.add_argument("--json", type=Path, help="write the report here")
    return parser.parse_args()


def main() -> int:
    """Ask, print, and return 1 if a bar is missed."""
    options = _options()
    findings: list[Finding] = []
    for part in options.parts or PARTS:
        with tempfile.TemporaryDirectory(prefix="manylora-tiers-", dir=options.scratch) as scratch:
            try:
                findings += asyncio.run(PARTS[part](House(options, Path(scratch))))
            except (Refused, RuntimeError, OSError) as error:
                sys.exit(f"manylora.loadtest.checks.tiers: {part}: {error}")
    print(headline(), end="\n\n")  # noqa: T201  # the result
    rows = [[each.what, each.found, each.bar, each.verdict] for each in findings]
    print(text_table(["", "found", "bar", ""], rows))  # noqa: T201  # the result
    if options.json is not None:
        told = {"environment": environment(), "findings": [each.to_json() for each in findings]}
        options.json.write_text(json.dumps(told, indent=2) + "\n")
    return int(any(each.met is False for each in findings))


if __name__ == "__main__":
    sys.exit(main())
