"""How the bars hold answers against those that are right: bit for bit, as transformers + peft, or near them."""

from collections.abc import Callable, Mapping, Sequence

from manylora.loadtest.checks.bars.reference import NEAR, Said
from manylora.loadtest.checks.bars.report import Report
from manylora.loadtest.material.answer import Answer
from manylora.loadtest.material.manylora_client import Ask, Client


def hold_answers(
    report: Report,
    promise: str,
    asks: Sequence[Ask],
    right: Sequence[Answer],
    found: Sequence[Answer],
    equal: Callable[[Answer, Answer], bool] = Answer.same_as,
) -> None:
    """Add the promise that each answer ``found`` is ``equal`` to the right one."""
    wrong = [
        describe(ask, one, other)
        for ask, one, other in zip(asks, right, found, strict=True)
        if not equal(other, one)
    ]
    report.share(promise, len(asks) - len(wrong), len(asks), wrong)


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


def describe(ask: Ask, one: Answer, other: Answer) -> str:
    """Say how two answers differ."""
    for answer in (one, other):
        if not answer.complete:
            return f"{ask.model}: {answer.error} {answer.error_message}"
    who = f"{ask.model}, prompt of {len(ask.prompt)}"
    same = [a == b for a, b in zip(one.tokens, other.tokens, strict=False)]
    if one.tokens == other.tokens:
        return f"{who}: the same tokens, log probabilities up to {gap(one, other):.1e} apart"
    where = same.index(False) if False in same else len(same)
    return f"{who}: token {where} of {len(one.tokens)} differs"


def gap(one: Answer, other: Answer) -> float:
    """Return the largest difference of a log probability."""
    return max((abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=False)), default=0.0)


async def distance(client: Client, ask: Ask, said: Said) -> float:
    """Return how far what a server makes of the reference's answer is from what the reference does."""
    return said.distance(await client.score(ask.model, ask.prompt, said.ids))


async def register_all(client: Client, sources: Mapping[str, str]) -> None:
    """Register adapters by name."""
    for name, source in sources.items():
        await client.register(name, source)
