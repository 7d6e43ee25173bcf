"""`manylora bench serve`: a closed loop of streams against any OpenAI-compatible server.

Finds out what the server takes, warms up, runs, and on request asks every distinct request again alone. What it
measured is loadtest/bench/serve_report.py's to show.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import httpx

from manylora.loadtest.bench.load_meter import ClientLoad, LoadMeter
from manylora.loadtest.bench.mixed_models import mixed_models
from manylora.loadtest.bench.popularity import MIXTURE
from manylora.loadtest.bench.workload import Planned, Workload, endless
from manylora.loadtest.material.http_client import Answer, Endpoint, Json, Target, Timeouts, ask, new_client
from manylora.loadtest.material.prompts import calibrate

PAUSE = 0.2
"""Seconds that a stream waits after an error, so that a server that refuses is not hammered."""
REFUSED = (400, 404, 422)
CLOSED = (401, 403)
KEY_HINT = "give the server's key with --api-key or in MANYLORA_BENCH_API_KEY"


class BenchError(Exception):
    """The server can't be measured. One line: why, and what to do."""


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


@dataclass(frozen=True, slots=True)
class Accepted:
    """What the server took when it was tried."""

    ignore_eos: bool
    usage: bool


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
    target = Target.at(bench.url, bench.api_key, bench.endpoint)
    async with new_client(target, bench.workload.streams, bench.timeouts) as client:
        watcher.phase("looking at the server", None)
        models, chosen_by = await choose_models(client, target, bench.adapters)
        if bench.workload.popularity.name == MIXTURE:
            models, chosen_by = mixed_models(models, bench.workload.streams), f"mixtures of two, {chosen_by}"
        accepted = await negotiate(client, target, models[0])
        work = bench.workload
        prompts = await calibrate(client, target, models[0], work.input_tokens, work.seed, bench.tokenizer)
        options = _options(bench, accepted)

        async def send(planned: Planned) -> Answer:
            body = target.body(models[planned.model], prompts[planned.prompt], options)
            return await ask(client, target, body)

        await _warm_up(bench, len(models), send, watcher)
        measured = await _measure(bench, models, send, watcher)
        measured.chosen_by, measured.accepted = chosen_by, accepted
        measured.prompts_counted_by = prompts.counted_by
        if bench.check:
            await _check(measured, send, watcher)
        return measured


async def choose_models(
    client: httpx.AsyncClient, target: Target, named: tuple[str, ...]
) -> tuple[list[str], str]:
    """Return the models to ask, and who chose them. Raises BenchError if the server lists none."""
    if named:
        return list(named), "as given"
    try:
        response = await client.get(f"{target.root}/v1/models")
        response.raise_for_status()
        listed = response.json()["data"]
        adapters = [str(model["id"]) for model in listed if model.get("parent")]
        names = adapters or [str(listed[0]["id"])]
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        how = KEY_HINT if status in CLOSED else "name --adapters"
        raise BenchError(f"{error.request.url} answers {status}: {how}") from None
    except httpx.HTTPError as error:
        raise BenchError(f"nothing answers at {target.root}: {error or type(error).__name__}") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise BenchError(f"{target.root}/v1/models lists no models: name --adapters") from None
    return names, "the server's models with a parent" if adapters else "the server's first model: no adapters"


async def negotiate(client: httpx.AsyncClient, target: Target, model: str) -> Accepted:
    """Try which options the server takes. Raises BenchError if it takes a plain request no better."""
    answer = Answer(0.0)
    for ignore_eos, usage in ((True, True), (False, True), (True, False), (False, False)):
        options: dict[str, object] = {"max_tokens": 2, "stream": True, "temperature": 0}
        options |= _extras(Accepted(ignore_eos, usage))
        answer = await ask(client, target, target.body(model, "Say yes.", options))
        if answer.error is None:
            return Accepted(ignore_eos, usage and answer.completion_tokens is not None)
        if not answer.error.startswith(tuple(f"http {status}" for status in REFUSED)):
            break
    detail, kind = " ".join(answer.error_message.split()), answer.error or ""
    hint = f" ({KEY_HINT})" if kind.startswith(tuple(f"http {status}" for status in CLOSED)) else ""
    raise BenchError(f"{target.path} with model {model!r} gives: {kind}{hint}. {detail}")


def _extras(accepted: Accepted) -> dict[str, object]:
    """Return the options that not every server knows."""
    extras: dict[str, object] = {"ignore_eos": True} if accepted.ignore_eos else {}
    return extras | ({"stream_options": {"include_usage": True}} if accepted.usage else {})


def _options(bench: ServeBench, accepted: Accepted) -> Json:
    options: dict[str, object] = {
        "max_tokens": bench.workload.output_tokens,
        "temperature": bench.temperature,
        "stream": True,
    }
    if bench.temperature > 0:
        options |= {"top_p": bench.top_p, "seed": bench.workload.seed}
    return options | _extras(accepted)


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
    if bench.duration is None:
        watcher.phase("measuring", len(plan))
        coming: Iterator[Planned] = iter(plan)
    else:
        watcher.phase(f"measuring for {bench.duration:g} s", None)
        coming = _until(began + bench.duration, endless(plan))
    async with LoadMeter() as meter:
        await _loop(coming, bench.workload.streams, send, take)
    seconds = time.perf_counter() - began
    return Measured(models, "", Accepted(False, False), "", finished, seconds, meter.result)


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
