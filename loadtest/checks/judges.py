"""What a conversation costs its second judge: `python -m manylora.loadtest.checks.judges`. 1 if a promise is broken.

Eight activated adapters (aLoRA, 2504.12397) are asked about one conversation of 2,000 tokens, one after the other, each
by its invocation at the end. Two promises. The conversation is computed once: whoever comes later computes no more than
what follows its last full block. And a later one's first token takes a tenth of the time that the first one's takes, at
most. Beside it stands what two ordinary adapters take, which share nothing. A new conversation in each round; the first
round warms up.
"""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from manylora.loadtest.checks.bars.material import kernels_option
from manylora.loadtest.material.checkpoints import (
    ALL_LINEAR,
    SHAPES,
    AdapterShape,
    write_adapter,
    write_base,
)
from manylora.loadtest.material.engines import BLOCK
from manylora.loadtest.material.environment import headline
from manylora.loadtest.material.manylora_client import Ask, Client
from manylora.loadtest.material.server_process import running, start_server
from manylora.loadtest.material.text_table import milliseconds, text_table
from manylora.server.kernels.choose import PLAIN

SHARE = 0.1
"""Of the first judge's time to its first token, that a later one may take."""
INVOCATION = 3
"""Tokens of each one's invocation."""
ORDINARY = 2


@dataclass(frozen=True, slots=True)
class Judged:
    """One judge's turn."""

    seconds: float
    """From asking to the first token, through HTTP."""
    computed: int
    """Prompt tokens that did not come from the prefix cache, by the server's metrics."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Medians over the rounds, in the order of asking."""

    tokens: int
    """Of the conversation."""
    judges: Sequence[Judged]
    ordinary: Sequence[Judged]

    @property
    def computed_once(self) -> bool:
        """Whether those after the first computed no more than what follows the conversation's last full block."""
        rest = self.tokens % BLOCK + INVOCATION
        first, *later = (judged.computed for judged in self.judges)
        return first == self.tokens + INVOCATION and all(each <= rest for each in later)

    @property
    def share(self) -> float:
        """The slowest later one's time by the first one's."""
        first, *later = (judged.seconds for judged in self.judges)
        return max(later) / first

    @property
    def met(self) -> bool:
        """Whether both promises are kept."""
        return self.computed_once and self.share <= SHARE

    def text(self) -> str:
        """Return the table and verdicts."""
        rows = [
            (
                f"{kind} {number + 1}",
                str(each.computed),
                milliseconds(each.seconds),
                f"{each.seconds / turns[0].seconds:.3f}",
            )
            for kind, turns in (("aLoRA", self.judges), ("LoRA", self.ordinary))
            for number, each in enumerate(turns)
        ]
        once = "pass" if self.computed_once else "FAIL"
        fast = "pass" if self.share <= SHARE else "FAIL"
        return "\n".join(
            [
                text_table(("judge", "tokens computed", "first token, ms", "of the first's"), rows),
                f"{once}: the conversation of {self.tokens} tokens is computed once",
                f"{fast}: later ones' first tokens take {self.share:.3f} of the first's (bar: {SHARE:g})",
            ]
        )


def write_material(directory: Path, shape: str, judges: int, rank: int) -> tuple[Path, list[tuple[int, ...]]]:
    """Write a base, judges and ordinary adapters of one rank; return the base and the judges' invocations."""
    base = write_base(directory / "base", SHAPES[shape], dtype=torch.bfloat16)
    first = SHAPES[shape].vocab_size // 2
    invocations = [
        tuple(range(first + INVOCATION * number, first + INVOCATION * (number + 1)))
        for number in range(judges)
    ]
    for number in range(judges + ORDINARY):
        invocation = invocations[number] if number < judges else ()
        adapter = AdapterShape(rank, 2.0 * rank, ALL_LINEAR, seed=number, invocation=invocation)
        write_adapter(directory / "adapters" / f"a{number}", base, adapter, dtype=torch.bfloat16)
    return base, invocations


async def measure(
    url: str, invocations: Sequence[tuple[int, ...]], tokens: int, rounds: int, vocabulary: int
) -> Figures:
    """Ask a server that knows the adapters of ``write_material``; token ids under half of the vocabulary are talk."""
    rng = random.Random(7)
    judges = len(invocations)
    turns: list[list[Judged]] = [[] for _ in range(judges + ORDINARY)]
    async with Client(url) as client:
        for number in range(judges + ORDINARY):
            await client.register(f"a{number}", f"a{number}", preload=True)
        for counted in range(-1, rounds):
            talk = tuple(rng.randrange(vocabulary // 2) for _ in range(tokens))
            for number, turn in enumerate(turns):
                end = invocations[number] if number < judges else invocations[0]
                judged = await _ask(client, Ask(f"a{number}", talk + end, 1))
                if counted >= 0:
                    turn.append(judged)
    medians = [
        Judged(statistics.median(each.seconds for each in turn), max(each.computed for each in turn))
        for turn in turns
    ]
    return Figures(tokens, medians[:judges], medians[judges:])


async def _ask(client: Client, ask: Ask) -> Judged:
    before = await _computed(client)
    answer = await client.complete(ask)
    if not answer.complete:
        raise RuntimeError(f"{ask.model}: {answer.error} {answer.error_message}")
    return Judged(answer.seconds, await _computed(client) - before)


async def _computed(client: Client) -> int:
    metrics = await client.metrics()
    queried, hit = (
        metrics.total(f"manylora_prefix_cache_{what}_tokens_total") for what in ("queried", "hit")
    )
    return int(queried - hit)


def main() -> int:
    """Serve, ask, print; 1 if a promise is broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2.5-0.5b")
    parser.add_argument("--kernels", type=kernels_option, default=kernels_option("auto"))
    parser.add_argument("--tokens", type=int, default=2000, help="of the conversation")
    parser.add_argument("--judges", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="counted ones; one more warms up")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    print(headline() + "\n")  # noqa: T201  # the result
    with tempfile.TemporaryDirectory(prefix="judges-") as scratch:
        directory = Path(scratch)
        base, invocations = write_material(directory, options.shape, options.judges, options.rank)
        flags = [
            *("--adapter-root", str(directory / "adapters"), "--quantization", "nf4"),
            *("--kernels", options.kernels, "--threads", str(options.threads), "--log-level", "warning"),
            *("--dtype", "float32" if options.kernels == PLAIN else "bfloat16"),
            *("--kv-cache-gib", "0.5", "--arena-rows", str(options.rank * (options.judges + ORDINARY))),
        ]
        server = start_server(base, directory / "server", flags)
        with running(server):
            vocabulary = SHAPES[options.shape].vocab_size
            found = asyncio.run(measure(server.url, invocations, options.tokens, options.rounds, vocabulary))
    print(found.text())  # noqa: T201  # the result
    return 0 if found.met else 1


if __name__ == "__main__":
    sys.exit(main())
