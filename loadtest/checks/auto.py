"""Whether ``model: "auto"`` finds whose prompt it is: `python -m manylora.loadtest.checks.auto`.

Starts the demo, or a base with adapters that bring manifests, and asks fresh requests, or what is in a file of rows
``{"model", "messages", "tools"?, "expected"?}``, of "auto". Prints who was chosen for whose prompts, how many extra
prompts were read for it, by the engine's own count, and how many answers were right. Exit status 1 if fewer than 97 %
went to the right one, or more than one extra prompt was read for a request.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from manylora.loadtest.material.server_process import ServerProcess, running, start_server
from manylora.loadtest.material.text_table import text_table

LEAST_RIGHT, MOST_READINGS = 0.97, 1.0
ROWS, SEED, STREAMS = 100, 20_261, 16
TOKENS = 64
_READINGS = re.compile(r'^manylora_requests_total\{adapter="auto",outcome="finished"\} (\S+)', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and what came of it."""

    wanted: str
    chosen: str
    score: float
    right: bool | None
    """Whether the answer is the expected one; None: none is."""


def demo_rows(directory: Path, part: str, rows: int, seed: int) -> list[dict[str, Any]]:
    """Return requests to the demo that its routing was not made with."""
    file = directory / "rows.jsonl"
    how = ("--part", part, "--rows", str(rows), "--seed", str(seed))
    subprocess.run([sys.executable, "-m", "manylora.demo.asking", str(file), *how], check=True)
    return rows_of(file)


def rows_of(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def ask_all(url: str, rows: Sequence[dict[str, Any]]) -> list[Asked]:
    """Ask all rows of "auto"."""
    with httpx.Client(base_url=url, timeout=120) as client, ThreadPoolExecutor(STREAMS) as pool:

        def ask(row: dict[str, Any]) -> Asked:
            body = {name: row[name] for name in ("messages", "tools") if name in row}
            more = {"model": "auto", "temperature": 0, "max_tokens": TOKENS}
            answer = client.post("/v1/chat/completions", json={**body, **more}).raise_for_status().json()
            said, expected = answer["choices"][0]["message"]["content"], row.get("expected")
            right = None if expected is None else said == expected
            return Asked(row["model"], answer["model"], answer["auto"]["score"], right)

        return list(pool.map(ask, rows))


def readings(url: str) -> float:
    """Return how many prompts the engine has read to choose by."""
    found = _READINGS.search(httpx.get(f"{url}/metrics", timeout=30).text)
    return float(found[1]) if found else 0.0


def report(asked: Sequence[Asked], extra: float) -> bool:
    """Print the figures; return whether the bar is met."""
    names = sorted({each.wanted for each in asked} | {each.chosen for each in asked})
    pairs = Counter((each.wanted, each.chosen) for each in asked)
    table = [[wanted, *(str(pairs[wanted, chosen]) for chosen in names)] for wanted in names]
    print(text_table(["asked for", *names], table))  # noqa: T201  # the result
    share = sum(each.wanted == each.chosen for each in asked) / len(asked)
    told = [each.right for each in asked if each.right is not None]
    per_request = extra / len(asked)
    print(f"right: {share:.1%} of {len(asked)} (bar: {LEAST_RIGHT:.0%})")  # noqa: T201
    print(f"extra prompts read: {per_request:.2f} a request (bar: {MOST_READINGS:g})")  # noqa: T201
    if told:
        print(f"answers exactly right: {sum(told) / len(told):.1%} of {len(told)}")  # noqa: T201
    scores = sorted(each.score for each in asked)
    print(f"scores: least {scores[0]:.2f}, median {scores[len(scores) // 2]:.2f}")  # noqa: T201
    return share >= LEAST_RIGHT and per_request <= MOST_READINGS


def measure(server: ServerProcess, rows: Sequence[dict[str, Any]]) -> bool:
    """Ask once so that all examples are read, then ask and count."""
    ask_all(server.url, rows[:1])
    before = readings(server.url)
    asked = ask_all(server.url, rows)
    return report(asked, readings(server.url) - before)


def main() -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", nargs="?", type=Path, help="directory of the base; none: the demo")
    parser.add_argument(
        "--adapter", action="append", default=[], help="NAME=DIRECTORY, of a base that is given"
    )
    parser.add_argument("--rows-of", type=Path, help="what is asked; none: fresh requests to the demo")
    parser.add_argument(
        "--part", default="held-out", help="of the demo's wordings: held-out, trial or examples"
    )
    parser.add_argument("--rows", type=int, default=ROWS, help="requests for each model of the demo")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--serve", default="", help="further flags of the server, in one word")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        drawn = given.part, given.rows, given.seed
        rows = rows_of(given.rows_of) if given.rows_of else demo_rows(place, *drawn)
        adapters = [word for adapter in given.adapter for word in ("--adapter", adapter)]
        server = start_server(given.base, place, [*adapters, "--auto-wait", "60", *given.serve.split()])
        with running(server):
            return 0 if measure(server, rows) else 1


if __name__ == "__main__":
    sys.exit(main())
