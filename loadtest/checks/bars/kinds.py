"""Bar 1: adapters of every kind, mixtures and the base in one batch. Each answer is that of the request alone, and of
transformers + peft.

Mixtures with an activated part, of which peft knows none, are loadtest/checks/activated_exactness.py's.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from manylora.loadtest.checks.bars.answers import distance, gap, hold_answers, hold_near, register_all
from manylora.loadtest.checks.bars.kinds_material import Served, make_asks, make_served
from manylora.loadtest.checks.bars.material import Material
from manylora.loadtest.checks.bars.quiet import report_books
from manylora.loadtest.checks.bars.reference import Reference, agrees
from manylora.loadtest.checks.bars.report import Report
from manylora.loadtest.material.answer import Answer
from manylora.loadtest.material.manylora_client import Ask, Client, Metrics
from manylora.loadtest.material.server_process import running, start_server
from manylora.server.kernels.choose import PLAIN

# Prompts are cut into chunks beside the decodes of others.
FLAGS = ("--max-step-tokens", "256", "--kv-cache-gib", "0.2", "--arena-rows", "1024")


@dataclass(frozen=True, slots=True)
class Case:
    """A base."""

    quantization: str
    tied: bool
    """Whether its head is its embedding."""


@dataclass(frozen=True, slots=True)
class KindsSize:
    """How much is asked."""

    cases: Sequence[Case] = (
        Case("none", tied=True),
        Case("none", tied=False),
        Case("nf4", tied=True),
        Case("nf4", tied=False),
    )
    mixtures: int = 16
    """That are drawn."""
    more: int = 100
    """Requests beyond one for each model, which come at once."""
    spread_seconds: float = 2.0
    """They arrive within this time."""
    talk_tokens: int = 230
    max_tokens: int = 48
    in_one_batch: float = 1.0
    """Share of the models that must be answered at the same moment."""


# Answers are short, so that some may end before others begin.
SMALL = KindsSize((Case("nf4", tied=True),), 2, 6, 0.5, 80, 16, in_one_batch=0.5)


async def kinds(directory: Path, size: KindsSize, kernels: str = PLAIN) -> Report:
    """Run the bar in ``directory``."""
    report = Report(f"1. Every kind of adapter is exact beside all others, kernels: {kernels}")
    for case in size.cases:
        where = directory / f"{case.quantization}-{'tied' if case.tied else 'own'}"
        material = Material.make(where, kernels, tied=case.tied)
        served = make_served(material, size.mixtures, tied=case.tied)
        asks = make_asks(served, size.more, size.talk_tokens, size.max_tokens)
        await _Held(report, where, served, asks, case, size).hold()
    return report


@dataclass(frozen=True, slots=True)
class _Held:
    """One base with everything on it."""

    report: Report
    directory: Path
    served: Served
    asks: Sequence[Ask]
    case: Case
    size: KindsSize

    @property
    def name(self) -> str:
        native = self.served.material.native
        numbers = "NF4" if self.case.quantization == "nf4" else "16 bits" if native else "float32"
        return f"{numbers}, {'tied' if self.case.tied else 'own'} head"

    async def hold(self) -> None:
        """Ask two servers, so that no cache is shared, and transformers + peft."""
        lengths = [len(ask.prompt) for ask in self.asks]
        self.report.note(
            f"{self.name}: {len(self.served.adapters)} adapters, {len(self.served.mixtures)} mixtures and the base;"
            f" {len(self.asks)} prompts of {min(lengths)} to {max(lengths)} tokens, {self.size.max_tokens} tokens each"
        )
        alone = await self._alone()
        mixed = await self._mixed(alone)
        if not self.served.material.native:
            self._hold_against_peft(mixed)

    async def _alone(self) -> list[Answer]:
        async with self._server("alone", threads=1) as client:
            alone = [await client.complete(ask) for ask in self.asks]
            if self.served.material.native:
                reference = self._reference()
                distances = [await distance(client, ask, reference.say(ask)) for ask in self.asks]
                hold_near(self.report, f"{self.name}: ", self.asks, distances)
        return alone

    async def _mixed(self, alone: Sequence[Answer]) -> list[Answer]:
        # Native kernels compute this by two threads: who of them takes what must not be felt either.
        async with self._server("mixed", threads=2 if self.served.material.native else 1) as client:
            mixed = await self._all_at_once(client, seed=3)
            before = await client.metrics()
            warm = await self._all_at_once(client, seed=4)
            after = await client.metrics()
            await report_books(self.report, client)
        for way, answers in (("mixed", mixed), ("mixed again, prefixes cached", warm)):
            promise = (
                f"{self.name}, {way}: tokens and log probabilities are bit for bit those of the request alone"
            )
            hold_answers(self.report, promise, self.asks, alone, answers)
        self._hold_company(mixed, warm)
        self._hold_prefixes(before, after)
        return mixed

    def _hold_company(self, mixed: Sequence[Answer], warm: Sequence[Answer]) -> None:
        """Cold, prompts are let in by and by beside those who are being answered already: some end before."""
        models, share = len(self.served.models), self.size.in_one_batch
        most = together(warm[:models])
        self.report.check(
            f"{self.name}, prefixes cached: at one moment {share:.0%} of the models answer, in one batch",
            f"{most} of {models}",
            most >= share * models,
        )
        self.report.note(f"{self.name}, cold: at one moment {together(mixed[:models])} of {models} answered")

    def _hold_prefixes(self, before: Metrics, after: Metrics) -> None:
        looked_up, found = (
            after.total(f"manylora_prefix_cache_{what}_tokens_total")
            - before.total(f"manylora_prefix_cache_{what}_tokens_total")
            for what in ("queried", "hit")
        )
        self.report.check(
            f"{self.name}, mixed again: most of the prompts' tokens come from the prefix cache",
            f"{found:.0f} of {looked_up:.0f}",
            found > looked_up / 2,
        )

    def _hold_against_peft(self, mixed: Sequence[Answer]) -> None:
        reference = self._reference()
        expected = [reference.answer(ask) for ask in self.asks]
        promise = f"{self.name}, mixed: tokens are those of transformers + peft"
        hold_answers(self.report, promise, self.asks, expected, mixed, agrees)
        worst = max(map(gap, expected, mixed))
        self.report.note(
            f"{self.name}: largest difference of a log probability to transformers + peft: {worst:.1e}"
        )

    def _reference(self) -> Reference:
        return self.served.reference(self.case.quantization)

    @asynccontextmanager
    async def _server(self, name: str, threads: int) -> AsyncIterator[Client]:
        """Serve everything."""
        material = self.served.material
        flags = material.arguments(*FLAGS, quantization=self.case.quantization, threads=threads)
        server = start_server(material.base, self.directory / name, flags)
        with running(server):
            async with Client(server.url) as client:
                await register_all(client, self.served.sources)
                yield client

    async def _all_at_once(self, client: Client, seed: int) -> list[Answer]:
        """Ask all models at one moment, and what else there is by and by."""
        rng = random.Random(seed)

        async def later(ask: Ask, delay: float) -> Answer:
            await asyncio.sleep(delay)
            return await client.stream(ask)

        first = len(self.served.models)
        delays = [
            rng.uniform(0, self.size.spread_seconds) if n >= first else 0.0 for n in range(len(self.asks))
        ]
        return await asyncio.gather(
            *(later(ask, delay) for ask, delay in zip(self.asks, delays, strict=True))
        )


def together(answers: Sequence[Answer]) -> int:
    """Return how many of the answers were under way at one moment, between their first token and their last."""
    spans = [(answer.times[0], answer.times[-1]) for answer in answers if answer.times]
    return max((sum(begin <= now <= end for begin, end in spans) for now, _ in spans), default=0)
