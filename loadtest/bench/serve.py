"""`manylora bench serve`: a closed loop of streams, or an open one of arrivals, against a server.

Finds out what the server takes, warms up, runs, and on request asks every distinct request again alone. What it
measured is loadtest/bench/serve_report.py's to show.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from manylora.loadtest.bench.goodput import ServiceLevel
from manylora.loadtest.bench.load_meter import ClientLoad, LoadMeter
from manylora.loadtest.bench.mixed_models import mixed_models
from manylora.loadtest.bench.open_loop import send_when_due
from manylora.loadtest.bench.popularity import MIXTURE
from manylora.loadtest.bench.server_look import Accepted, BenchError, choose_models, extras, negotiate
from manylora.loadtest.bench.workload import Planned, Workload, endless
from manylora.loadtest.material.answer import Answer, Json
from manylora.loadtest.material.dialects import Endpoint, dialect_of
from manylora.loadtest.material.http_client import Target, Timeouts, ask, new_client
from manylora.loadtest.material.prompts import Prompts, calibrate

PAUSE = 0.2
"""Seconds that a stream waits after an error, so that a server that refuses is not hammered."""


@dataclass(frozen=True, slots=True)
class ServeBench:
    """What to measure."""

    url: str
    workload: Workload
    adapters: tuple[str, ...] = ()
    """Model names to ask; empty: those that the server lists with a parent, else its first model."""
    api_key: str | None = None
    endpoint: Endpoint = "completions"
    duration: float | None = None
    """Seconds after which no new request is sent; None: the workload's requests, once."""
    warm_up: int | None = None
    """Requests that come first and don't count; None: two for each stream."""
    temperature: float = 0.0
    top_p: float = 1.0
    tokenizer: Path | None = None
    check: bool = False
    timeouts: Timeouts = field(default_factory=Timeouts)
    server: str = "openai"
    """Which of dialects.KINDS it is."""
    most_models: int | None = None
    """Ask the first so many models only; None: all."""
    level: ServiceLevel | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """A counted request and what it gave."""

    planned: Planned
    answer: Answer


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A request whose answer under load is not the one that it gives alone."""

    model: str
    prompt: int
    under_load: str
    alone: str


@dataclass(slots=True)
class Measured:
    """What a run gave."""

    models: list[str]
    chosen_by: str
    accepted: Accepted
    prompts_counted_by: str
    finished: list[Finished]
    seconds: float
    client: ClientLoad
    began: float = 0.0
    """time.perf_counter() when the counted part began."""
    checked: int = 0
    """Distinct requests asked again alone."""
    mismatches: list[Mismatch] = field(default_factory=list)
    alone_errors: int = 0
    """Requests that failed when they were asked alone: they prove nothing."""


class Watcher(Protocol):
    """Is told how a run goes. Called on the event loop, so it must be quick."""

    def phase(self, name: str, total: int | None) -> None:
        """A phase begins; ``total`` requests are expected in it, if that is known."""
        ...

    def answered(self, answer: Answer) -> None:
        """A request of the phase has ended."""
        ...


class Silent:
    """The watcher that shows nothing."""

    def phase(self, name: str, total: int | None) -> None:
        """Do nothing."""

    def answered(self, answer: Answer) -> None:
        """Do nothing."""


Ask = Callable[[Planned], Awaitable[Answer]]
Take = Callable[[Planned, Answer], None]


async def run_serve(bench: ServeBench, watcher: Watcher) -> Measured:
    """Measure. Raises BenchError if the server does not answer at all, ValueError for a bad URL."""
    work = bench.workload
    target = Target.at(bench.url, bench.api_key, bench.endpoint, dialect_of(bench.server))
    # The streams that warm up, or in an open loop as many as are under way.
    async with new_client(target, None if work.is_open else work.streams, bench.timeouts) as client:
        watcher.phase("looking at the server", None)
        target, models, chosen_by = await choose_models(client, target, bench.adapters)
        models = _first(models, bench.most_models)
        if work.popularity.name == MIXTURE:
            models, chosen_by = mixed_models(models, work.streams), f"mixtures of two, {chosen_by}"
        accepted = await negotiate(client, target, models[0])
        prompts = await calibrate(client, target, models[0], work.seed, bench.tokenizer)

        async def send(planned: Planned) -> Answer:
            options = _options(bench, accepted, planned.output_tokens)
            return await ask(
                client, target, target.body(models[planned.model], _prompt(prompts, planned), options)
            )

        await _warm_up(bench, len(models), send, watcher)
        measured = await _measure(bench, models, send, watcher)
        measured.chosen_by, measured.accepted = chosen_by, accepted
        measured.prompts_counted_by = prompts.counted_by
        if bench.check:
            await _check(measured, send, watcher)
        return measured


def _first(models: list[str], most: int | None) -> list[str]:
    if most is not None and len(models) < most:
        raise BenchError(f"{most} adapters are to be asked, and there are {len(models)}")
    return models[:most]


def _prompt(prompts: Prompts, planned: Planned) -> str:
    return planned.text or prompts.of(planned.prompt, planned.input_tokens)


def _options(bench: ServeBench, accepted: Accepted, tokens: int) -> Json:
    options: dict[str, object] = {
        "max_tokens": tokens,
        "temperature": bench.temperature,
        "stream": True,
    }
    if bench.temperature > 0:
        options |= {"top_p": bench.top_p, "seed": bench.workload.seed}
    return options | extras(accepted)


async def _warm_up(bench: ServeBench, models: int, send: Ask, watcher: Watcher) -> None:
    count = 2 * bench.workload.streams if bench.warm_up is None else bench.warm_up
    if not count:
        return
    answers: list[Answer] = []
    watcher.phase("warm-up", count)

    def take(_: Planned, answer: Answer) -> None:
        answers.append(answer)
        watcher.answered(answer)

    await _loop(iter(bench.workload.warm_up(models, count)), bench.workload.streams, send, take)
    if all(answer.error for answer in answers):
        raise BenchError(
            f"every request of the warm-up failed: {answers[0].error}. {answers[0].error_message}"
        )


async def _measure(bench: ServeBench, models: list[str], send: Ask, watcher: Watcher) -> Measured:
    plan = bench.workload.plan(len(models))
    finished: list[Finished] = []

    def take(planned: Planned, answer: Answer) -> None:
        finished.append(Finished(planned, answer))
        watcher.answered(answer)

    began = time.perf_counter()
    async with LoadMeter() as meter:
        if bench.workload.is_open:
            watcher.phase("measuring", len(plan))
            await send_when_due(plan, send, take)
        elif bench.duration is None:
            watcher.phase("measuring", len(plan))
            await _loop(iter(plan), bench.workload.streams, send, take)
        else:
            watcher.phase(f"measuring for {bench.duration:g} s", None)
            coming = _until(began + bench.duration, endless(plan))
            await _loop(coming, bench.workload.streams, send, take)
    seconds = time.perf_counter() - began
    return Measured(models, "", Accepted(False, False), "", finished, seconds, meter.result, began)


async def _loop(coming: Iterator[Planned], streams: int, send: Ask, take: Take) -> None:
    """Keep ``streams`` requests under way until there are no more."""

    async def stream() -> None:
        for planned in coming:  # one iterator for all: each takes what is next
            answer = await send(planned)
            take(planned, answer)
            if answer.error is not None:
                await asyncio.sleep(PAUSE)

    async with asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(stream())


def _until(deadline: float, plan: Iterable[Planned]) -> Iterator[Planned]:
    for planned in plan:
        if time.perf_counter() >= deadline:
            return
        yield planned


async def _check(measured: Measured, send: Ask, watcher: Watcher) -> None:
    """Ask each distinct request alone and compare it with every answer that it got under load."""
    by_request: dict[Planned, list[Answer]] = {}
    for each in measured.finished:
        if each.answer.error is None:
            by_request.setdefault(each.planned, []).append(each.answer)
    watcher.phase("asking each request alone", len(by_request))
    for planned, answers in by_request.items():
        alone = await send(planned)
        watcher.answered(alone)
        if alone.error is not None:
            measured.alone_errors += 1
            continue
        measured.checked += 1
        expected = alone.text, alone.finish_reason
        for answer in answers:
            found = answer.text, answer.finish_reason
            if found != expected:
                name = measured.models[planned.model]
                measured.mismatches.append(Mismatch(name, planned.prompt, found[0], expected[0]))
