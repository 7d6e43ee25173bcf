"""`python -m manylora.loadtest.checks.tenants`: two tenants on one server, and neither sees anything of the other.

Random requests with either's keys and names of both go to every route, and each answer is held against a model of what
its caller may see: which status it has, which names a list holds, and that no answer tells a name of the other's that
its request didn't. Then 64 streams at once push against a key's limits, and a server is killed again and again while a
budget is spent: what was answered must still be spent after each start. Exits 1 if anything was wrong.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from manylora.loadtest.checks.tenants_house import ADMIN, BASE, TENANTS, new_key
from manylora.loadtest.checks.tenants_limits import stream_at_once
from manylora.loadtest.checks.tenants_walk import walk
from manylora.loadtest.material.checkpoints import TINY, AdapterShape, write_adapter, write_base
from manylora.loadtest.material.server_process import ServerProcess, running, start_server

FLAGS = ("--quantization", "none", "--dtype", "float32", "--kv-cache-gib", "0.05", "--arena-rows", "128")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is asked."""

    requests: int = 10_000
    streams: int = 64
    kills: int = 10
    spent_between: int = 40
    """Requests until a kill, at most."""
    seed: int = 1


def spend_and_kill(start: Callable[[], ServerProcess], sizes: Sizes) -> list[str]:
    """Spend a budget on servers that are killed; return what was wrong."""
    dice, wrong, answered, key = random.Random(sizes.seed), [], 0, ""
    budget = 64 * (sizes.kills + 2) * max(64, sizes.spent_between)
    head = {"authorization": f"Bearer {ADMIN}"}
    for number in range(sizes.kills + 1):
        server = start()
        try:
            server.wait_until_ready()
            key = key or new_key(server.url, "spender", budget=budget)[1]
            keys = httpx.get(f"{server.url}/admin/keys", headers=head, timeout=60).json()["data"]
            (used,) = [each["used"] for each in keys if each["tenant"] == "spender"]
            if not answered <= used <= budget:
                wrong.append(f"after {number} kills {used} tokens are spent, and {answered} were answered")
            for _ in range(dice.randint(1, sizes.spent_between)):
                body = {"model": BASE, "prompt": "hello", "max_tokens": dice.randint(1, 16)}
                own = {"authorization": f"Bearer {key}"}
                answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=own, timeout=60)
                answer.raise_for_status()
                answered += answer.json()["usage"]["total_tokens"]
        finally:
            server.kill()
    return wrong


def write_files(root: Path) -> None:
    """Write a base, and two adapters in a folder of each tenant."""
    base = write_base(root / "base", TINY)
    for tenant in TENANTS:
        for number, name in enumerate(("one", "two")):
            shape = AdapterShape(rank=4 << number, seed=number)
            write_adapter(root / "adapters" / tenant / name, base, shape)


def check(sizes: Sizes) -> dict[str, list[str]]:
    """Return what was wrong with each of the promises."""
    with tempfile.TemporaryDirectory() as room:
        root = Path(room)
        write_files(root)
        folder = str(root / "adapters")
        flags = (*FLAGS, "--admin-key", ADMIN, "--served-model-name", BASE, "--adapter-root", folder)

        def start(data: str) -> ServerProcess:
            return start_server(root / "base", root / data, flags)

        found: dict[str, list[str]] = {}
        with running(server := start("walked")):
            found[f"{sizes.requests} requests of two tenants"] = walk(server.url, sizes.requests, sizes.seed)
            found[f"{sizes.streams} streams at once"] = stream_at_once(server.url, sizes.streams, sizes.seed)
        found[f"{sizes.kills} kills"] = spend_and_kill(lambda: start("killed"), sizes)
        return found


def main() -> None:
    """Run the check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    usual = Sizes()
    parser.add_argument("--requests", type=int, default=usual.requests)
    parser.add_argument("--kills", type=int, default=usual.kills)
    parser.add_argument("--seed", type=int, default=usual.seed)
    given = parser.parse_args()
    found = check(Sizes(given.requests, kills=given.kills, seed=given.seed))
    for promise, wrong in found.items():
        print(f"{promise}: {'kept' if not wrong else f'{len(wrong)} faults'}")  # noqa: T201
        for fault in wrong[:20]:
            print(f"  {fault}")  # noqa: T201
    sys.exit(1 if any(found.values()) else 0)


if __name__ == "__main__":
    main()
