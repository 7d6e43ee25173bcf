"""A batch through kill -9: `python -m manylora.loadtest.checks.batch_kills [BASE] [--lines 10000] [--kills 5]`.

Starts `manylora serve` on a base (none: the demo), hands in a batch, kills the server as a power cut would at moments
spread over the batch, and starts it again on the same data each time. Exit status 1 unless every line is answered,
well, and once, in the order of the lines.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from manylora.loadtest.material.server_process import ServerProcess, start_server

POLL_SECONDS = 0.05
OVER = ("completed", "failed", "expired", "cancelled")
START_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Found:
    """What came of a batch."""

    status: str
    killed_at: tuple[int, ...]
    """Lines that were answered when the server was killed."""
    seconds: float
    missing: int
    """Lines without an answer."""
    again: int
    """Answers beyond the first of their line."""
    refused: int
    """Lines that were not answered well."""
    in_order: bool

    @property
    def holds(self) -> bool:
        """Whether each line was answered once."""
        faults = (self.missing, self.again, self.refused)
        return self.status == "completed" and faults == (0, 0, 0) and self.in_order


def run(
    base: Path | None,
    directory: Path,
    lines: int,
    kills: int,
    seed: int,
    tokens: int,
    arguments: Sequence[str] = (),
) -> Found:
    """Run the check with everything below ``directory``. Raises RuntimeError if a server doesn't start."""
    began = time.monotonic()
    chance = random.Random(seed)
    moments = [lines * (n + chance.random()) / (kills + 1) for n in range(kills)]
    server = _start(base, directory, arguments)
    killed_at: list[int] = []
    try:
        batch_id = _hand_in(server, lines, tokens)
        for moment in moments:
            done = _wait(server, batch_id, moment)
            server.kill()
            killed_at.append(done)
            server = _start(base, directory, arguments)
        _wait(server, batch_id, None)
        return _found(server, batch_id, lines, tuple(killed_at), time.monotonic() - began)
    finally:
        server.kill()


def _start(base: Path | None, directory: Path, arguments: Sequence[str]) -> ServerProcess:
    server = start_server(base, directory, arguments)
    try:
        server.wait_until_ready(START_SECONDS)
    except BaseException:
        server.kill()
        raise
    return server


def _hand_in(server: ServerProcess, lines: int, tokens: int) -> str:
    model = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
    url = "/v1/completions"
    content = "".join(
        json.dumps(
            {
                "custom_id": f"line {number}",
                "method": "POST",
                "url": url,
                "body": {"model": model, "prompt": f"{number}:", "max_tokens": tokens, "ignore_eos": True},
            }
        )
        + "\n"
        for number in range(lines)
    )
    file = httpx.post(
        f"{server.url}/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", content.encode())}
    )
    file.raise_for_status()
    body = {"input_file_id": file.json()["id"], "endpoint": url, "completion_window": "24h"}
    batch = httpx.post(f"{server.url}/v1/batches", json=body)
    batch.raise_for_status()
    return str(batch.json()["id"])


def _wait(server: ServerProcess, batch_id: str, moment: float | None) -> int:
    """Return how many lines are answered, once that is ``moment`` or more, or the batch is over."""
    while True:
        batch = httpx.get(f"{server.url}/v1/batches/{batch_id}").json()
        done = int(batch["request_counts"]["completed"])
        if batch["status"] in OVER or (moment is not None and done >= moment):
            return done
        time.sleep(POLL_SECONDS)


def _found(
    server: ServerProcess, batch_id: str, lines: int, killed_at: tuple[int, ...], seconds: float
) -> Found:
    batch = httpx.get(f"{server.url}/v1/batches/{batch_id}").json()
    told = []
    for file_id in (batch["output_file_id"], batch["error_file_id"]):
        if file_id is not None:
            text = httpx.get(f"{server.url}/v1/files/{file_id}/content", timeout=60).text
            told += [json.loads(line) for line in text.splitlines()]
    counts = Counter(each["custom_id"] for each in told)
    wanted = [f"line {number}" for number in range(lines)]
    return Found(
        batch["status"],
        killed_at,
        seconds,
        missing=sum(name not in counts for name in wanted),
        again=len(told) - len(counts),
        refused=sum(each["response"] is None or each["response"]["status_code"] != 200 for each in told),
        in_order=[each["custom_id"] for each in told] == wanted,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", nargs="?", type=Path, help="directory of the base; none: the demo")
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=4, help="of each answer")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        found = run(given.base, Path(directory), given.lines, given.kills, given.seed, given.tokens)
    sys.stdout.write(
        f"{given.lines} lines, killed when {', '.join(map(str, found.killed_at))} were answered\n"
    )
    sys.stdout.write(
        f"{found.status} after {found.seconds:.0f} s: {found.missing} missing, {found.again} twice, "
        f"{found.refused} refused, {'in' if found.in_order else 'out of'} order\n"
    )
    return 0 if found.holds else 1


if __name__ == "__main__":
    sys.exit(main())
