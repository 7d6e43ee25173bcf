"""Bar 1: a mixed batch gives each request, token for token, what it gets alone and what transformers + peft give."""

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from manylora.loadtest.checks.bars.material import Material, prompts
from manylora.loadtest.checks.bars.reference import NEAR, Reference, Said, agrees
from manylora.loadtest.checks.bars.report import Report
from manylora.loadtest.material.answer import Answer
from manylora.loadtest.material.manylora_client import Ask, Client
from manylora.loadtest.material.server_process import running, start_server
from manylora.server.kernels.choose import PLAIN

LONGEST_PROMPT = 300
ADAPTERS = 8
# Prompts are cut into chunks beside the decodes of others.
FLAGS = ("--max-step-tokens", "128", "--kv-cache-gib", "0.2", "--arena-rows", "256")


@dataclass(frozen=True, slots=True)
class ExactSize:
    """How much is asked."""

    requests: int = 54
    """Over the base and all adapters in turn."""
    max_tokens: int = 48
    spread_seconds: float = 2.0
    """All requests arrive within this time."""


SMALL = ExactSize(requests=27, max_tokens=12, spread_seconds=0.5)


async def exact(directory: Path, size: ExactSize, kernels: str = PLAIN) -> Report:
    """Run the bar in ``directory``."""
    report = Report(
        f"1. Mixed batch is exact: {ADAPTERS} adapters of ranks 4 to 64 and the base, kernels: {kernels}"
    )
    material = Material.make(directory, kernels)
    sources = {f"adapter{number}": source for number, source in enumerate(material.mixed(ADAPTERS))}
    asks = make_asks([material.base.name, *sources], size)
    await hold_exact(report, directory, material, sources, asks, size)
    return report


async def hold_exact(
    report: Report,
    directory: Path,
    material: Material,
    sources: Mapping[str, str],
    asks: Sequence[Ask],
    size: ExactSize,
    mixtures: Mapping[str, Sequence[tuple[str, float]]] | None = None,
) -> None:
    """Hold what ``asks`` get mixed against what they get alone, and against transformers + peft.

    ``sources`` are adapters by name; ``mixtures`` (adapter, weight) pairs by the models that the asks call them.
    """
    paths = {name: material.adapters / source for name, source in sources.items()}
    for quantization in ("none", "nf4"):
        name = quantization if quantization != "none" else "16 bits" if material.native else "float32"
        reference = Reference(material.base, paths, mixtures, quantization)
        ways = await ask_both_ways(directory, material, sources, asks, size, quantization, reference)
        for kind, answers in (("mixed", ways.mixed), ("mixed again, prefixes cached", ways.warm)):
            wrong = [
                describe(ask, one, other)
                for ask, one, other in zip(asks, ways.alone, answers, strict=True)
                if not one.same_as(other)
            ]
            promise = (
                f"{name}, {kind}: tokens and log probabilities are bit for bit those of the request alone"
            )
            report.share(promise, len(asks) - len(wrong), len(asks), wrong)
        if material.native:
            hold_near(report, f"{name}: ", asks, ways.distances)
        elif quantization == "none":
            _hold_against_peft(report, reference, asks, ways.mixed)
    lengths = [len(ask.prompt) for ask in asks]
    report.note(
        f"{len(asks)} requests within {size.spread_seconds:g} s, prompts of {min(lengths)} to {max(lengths)} tokens,"
        f" {size.max_tokens} tokens each"
    )


def make_asks(models: Sequence[str], size: ExactSize) -> list[Ask]:
    """Return requests for all models in turn; the shortest and the longest prompt are among them."""
    rng = random.Random(1)
    lengths = [1, LONGEST_PROMPT, *(rng.randint(1, LONGEST_PROMPT) for _ in range(size.requests - 2))]
    rng.shuffle(lengths)
    made = prompts(lengths, seed=2)
    return [Ask(models[i % len(models)], prompt, size.max_tokens) for i, prompt in enumerate(made)]


def describe(ask: Ask, one: Answer, other: Answer) -> str:
    """Say how two answers differ."""
    for answer in (one, other):
        if not answer.complete:
            return f"{ask.model}: {answer.error} {answer.error_message}"
    same = [a == b for a, b in zip(one.tokens, other.tokens, strict=False)]
    where = same.index(False) if False in same else len(same)
    return f"{ask.model}, prompt of {len(ask.prompt)}: token {where} of {len(one.tokens)} differs"


@dataclass(frozen=True, slots=True)
class Ways:
    """Answers alone, mixed, and mixed once more."""

    alone: Sequence[Answer]
    mixed: Sequence[Answer]
    warm: Sequence[Answer]
    distances: Sequence[float]
    """Of native kernels: how far each request is from the reference; see Said.distance."""


async def ask_both_ways(
    directory: Path,
    material: Material,
    sources: Mapping[str, str],
    asks: Sequence[Ask],
    size: ExactSize,
    quantization: str,
    reference: Reference,
) -> Ways:
    """Ask two servers, so that no cache is shared.

    Native kernels compute what is mixed by two threads: who of them takes what must not be felt either.
    """
    flags = material.arguments(*FLAGS, quantization=quantization)
    server = start_server(material.base, directory / f"{quantization}-alone", flags)
    distances: list[float] = []
    with running(server):
        async with Client(server.url) as client:
            await register_all(client, sources)
            alone = [await client.complete(ask) for ask in asks]
            if material.native:
                distances = [await distance(client, ask, reference.say(ask)) for ask in asks]
    threads = 2 if material.native else 1
    flags = material.arguments(*FLAGS, quantization=quantization, threads=threads)
    server = start_server(material.base, directory / f"{quantization}-mixed", flags)
    with running(server):
        async with Client(server.url) as client:
            await register_all(client, sources)
            mixed = await _all_at_once(client, asks, size, seed=3)
            warm = await _all_at_once(client, asks, size, seed=4)
    return Ways(alone, mixed, warm, distances)


async def distance(client: Client, ask: Ask, said: Said) -> float:
    """Return how far what a server makes of the reference's answer is from what the reference does."""
    return said.distance(await client.score(ask.model, ask.prompt, said.ids))


async def register_all(client: Client, sources: Mapping[str, str]) -> None:
    """Register adapters by name."""
    for name, source in sources.items():
        await client.register(name, source)


async def _all_at_once(client: Client, asks: Sequence[Ask], size: ExactSize, seed: int) -> list[Answer]:
    rng = random.Random(seed)

    async def later(ask: Ask, delay: float) -> Answer:
        await asyncio.sleep(delay)
        return await client.stream(ask)

    delays = [rng.uniform(0, size.spread_seconds) for _ in asks]
    return await asyncio.gather(*(later(ask, delay) for ask, delay in zip(asks, delays, strict=True)))


def hold_near(report: Report, what: str, asks: Sequence[Ask], distances: Sequence[float]) -> None:
    """Add the promise that native kernels compute what the reference does, as far as their arithmetic goes."""
    wrong = [
        f"{ask.model}, prompt of {len(ask.prompt)}: {each:.2g}"
        for ask, each in zip(asks, distances, strict=True)
        if not each <= NEAR
    ]
    promise = (
        f"{what}log probabilities of transformers' + peft's answers are within {NEAR:g} nats of theirs (mean)"
    )
    report.share(promise, len(asks) - len(wrong), len(asks), wrong)
    report.note(f"{what}those answers' mean distances are {min(distances):.4f} to {max(distances):.4f} nats")


def _hold_against_peft(
    report: Report, reference: Reference, asks: Sequence[Ask], mixed: Sequence[Answer]
) -> None:
    expected = [reference.answer(ask) for ask in asks]
    wrong = [
        describe(ask, one, other)
        for ask, one, other in zip(asks, expected, mixed, strict=True)
        if not agrees(other, one)
    ]
    report.share(
        "float32, mixed: tokens are those of transformers + peft", len(asks) - len(wrong), len(asks), wrong
    )
    gaps = [
        abs(a - b)
        for one, other in zip(expected, mixed, strict=True)
        for a, b in zip(one.logprobs, other.logprobs, strict=False)
    ]
    report.note(f"largest difference of a log probability to transformers + peft: {max(gaps):.1e}")
