"""Bar 5: many clients stream at once and a third hang up; the others finish right, and nothing stays held."""

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from manylora.loadtest.checks.bars.answers import hold_answers
from manylora.loadtest.checks.bars.material import Material, prompts
from manylora.loadtest.checks.bars.quiet import NOTHING, quiet, report_books
from manylora.loadtest.checks.bars.report import Report
from manylora.loadtest.material.answer import HUNG_UP, Answer
from manylora.loadtest.material.manylora_client import Ask, Client, held
from manylora.loadtest.material.server_process import running, start_server
from manylora.server.kernels.choose import PLAIN

ADAPTERS = 8
PROMPT_LENGTHS = (1, 17, 40, 110)
FLAGS = ("--kv-cache-gib", "0.1", "--arena-rows", "256")


@dataclass(frozen=True, slots=True)
class HangupSize:
    """How much is asked."""

    clients: int = 256
    max_tokens: int = 48


SMALL = HangupSize(clients=64, max_tokens=16)


async def hangups(directory: Path, size: HangupSize, kernels: str = PLAIN) -> Report:
    """Run the bar in ``directory``."""
    report = Report(f"5. Hang-ups: {size.clients} streaming clients, a third leave at random points")
    material = Material.make(directory, kernels)
    server = start_server(material.base, directory / "server", material.arguments(*FLAGS))
    with running(server):
        async with Client(server.url) as client:
            sources = {f"adapter{i}": source for i, source in enumerate(material.mixed(ADAPTERS))}
            for name, source in sources.items():
                await client.register(name, source)
            models = [material.base.name, *sources]
            alone = await _alone(client, models, size)
            aborted = (await client.metrics()).total("manylora_requests_total", 'outcome="aborted"')
            await _storm(report, client, alone, size)
            gone = (await client.metrics()).total("manylora_requests_total", 'outcome="aborted"') - aborted
            report.note(f"{gone:.0f} requests were ended by the server because their client had left")
            await _report_leaks(report, client, list(sources))
    return report


async def _alone(client: Client, models: Sequence[str], size: HangupSize) -> Mapping[Ask, Answer]:
    asks = [Ask(m, prompt, size.max_tokens) for m in models for prompt in prompts(PROMPT_LENGTHS, seed=6)]
    return {ask: await client.complete(ask) for ask in asks}


async def _storm(report: Report, client: Client, alone: Mapping[Ask, Answer], size: HangupSize) -> None:
    rng = random.Random(7)
    asks = [rng.choice(list(alone)) for _ in range(size.clients)]
    leaving = {
        i: rng.randint(1, size.max_tokens - 1) for i in rng.sample(range(size.clients), size.clients // 3)
    }
    answers = await asyncio.gather(
        *(client.stream(ask, hang_up_after=leaving.get(i)) for i, ask in enumerate(asks))
    )
    stayed = [i for i in range(size.clients) if i not in leaving]
    hold_answers(
        report,
        "those who stay get, bit for bit, what they get alone",
        [asks[i] for i in stayed],
        [alone[asks[i]] for i in stayed],
        [answers[i] for i in stayed],
    )
    left = [answers[i] for i in leaving]
    beginnings = [_begins(answers[i], alone[asks[i]]) for i in leaving]
    report.share("those who leave have the beginning of their answer", sum(beginnings), len(left))


def _begins(answer: Answer, whole: Answer) -> bool:
    count = len(answer.tokens)
    return answer.error == HUNG_UP and (answer.tokens, answer.logprobs) == (
        whole.tokens[:count],
        whole.logprobs[:count],
    )


async def _report_leaks(report: Report, client: Client, names: Sequence[str]) -> None:
    deadline = asyncio.get_running_loop().time() + 30
    now = await held(client)
    while (now.sequences or now.blocks) and asyncio.get_running_loop().time() < deadline:
        now = await held(client)
    report.check(
        "no sequence and no block stays held",
        f"{now.sequences} sequences, {now.blocks} blocks",
        now.sequences == 0 and now.blocks == 0,
    )
    # A claim that leaked would make a delete wait for ever.
    try:
        async with asyncio.timeout(30):
            for name in names:
                await client.delete(name)
        deleted = True
    except TimeoutError:
        deleted = False
    report.check("no claim on an adapter stays: each is deleted at once", "yes" if deleted else "no", deleted)
    after = await quiet(client)
    report.check("then nothing is held at all", str(after), after == NOTHING)
    await report_books(report, client)
