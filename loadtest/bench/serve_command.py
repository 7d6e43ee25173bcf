"""`manylora bench serve` as it is typed: its options, and the workload that they make."""

import asyncio
import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from manylora.loadtest.bench.arrivals import Arrivals
from manylora.loadtest.bench.goodput import ServiceLevel
from manylora.loadtest.bench.lengths import Range, Uniform
from manylora.loadtest.bench.options import (
    Json,
    PopularityName,
    PromptCount,
    Requests,
    Seed,
    Streams,
    Temperature,
    TopP,
    fail,
    stdout,
    write_json,
)
from manylora.loadtest.bench.popularity import Popularity
from manylora.loadtest.bench.serve import ServeBench
from manylora.loadtest.bench.settings import NAMES as SETTINGS
from manylora.loadtest.bench.settings import Setting
from manylora.loadtest.bench.traces import Recorded, by_letters, read_trace
from manylora.loadtest.bench.workload import REQUESTS_PER_STREAM, Workload
from manylora.loadtest.material.http_client import Timeouts

SAID_BY_A_SETTING = (
    "streams",
    "popularity",
    "input_tokens",
    "output_tokens",
    "requests",
    "rate",
    "cv",
    "trace",
)


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What was typed."""

    url: Annotated[str, typer.Option(help="The server, with or without /v1.")] = "http://127.0.0.1:8000"
    server: Annotated[
        Literal["openai", "vllm", "lorax", "llama.cpp"], typer.Option(help="How it is asked for an adapter.")
    ] = "openai"
    streams: Streams = 8
    popularity: PopularityName = "uniform"
    adapters: Annotated[str, typer.Option(help="Model names, a,b,…; none: as the server lists.")] = ""
    setting: Annotated[
        str | None, typer.Option(help=f"A paper's workload: {', '.join(SETTINGS)}, NAME:key=value,….")
    ] = None
    input_tokens: Annotated[str, typer.Option("--input", help="Tokens of a prompt, N or LOW:HIGH.")] = "64"
    output_tokens: Annotated[str, typer.Option("--output", help="Of an answer, N or LOW:HIGH.")] = "64"
    rate: Annotated[float, typer.Option(min=0, help="Open loop: requests a second; 0: closed.")] = 0
    cv: Annotated[float, typer.Option(min=0, help="Of the gaps; 1: Poisson, else Gamma.")] = 1
    trace: Annotated[Path | None, typer.Option(help="ShareGPT's .json, or Azure's .csv.")] = None
    speed: Annotated[float, typer.Option(min=0.001, help="Times as fast as the trace's clock.")] = 1
    requests: Requests = 0
    duration: Annotated[float, typer.Option(min=0, help="Seconds to ask for, instead of --requests.")] = 0
    warmup: Annotated[int, typer.Option(min=-1, help="Requests before; -1: two for each stream.")] = -1
    prompts: PromptCount = 0
    seed: Seed = 0
    temperature: Temperature = 0.0
    top_p: TopP = 1.0
    goodput: Annotated[str, typer.Option(help="A service level in ms: ttft:2000,tpot:100,e2e:30000.")] = ""
    api_key: Annotated[str | None, typer.Option(envvar="MANYLORA_BENCH_API_KEY", help="Bearer key.")] = None
    endpoint: Annotated[Literal["completions", "chat"], typer.Option(help="Which to ask.")] = "completions"
    tokenizer: Annotated[Path | None, typer.Option(help="Directory that counts prompts' tokens.")] = None
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds of silence that are too many.")] = 120.0
    check: Annotated[bool, typer.Option("--check", help="Compare with answers given alone.")] = False
    json_file: Json = None
    html: Annotated[Path | None, typer.Option(help="Write a page with plots here.")] = None

    @property
    def names(self) -> tuple[str, ...]:
        """Return the models that were named."""
        return tuple(name.strip() for name in self.adapters.split(",") if name.strip())


def _typed() -> Callable[..., None]:
    """Return the command for typer, whose parameters are the fields of ServeOptions."""

    def serve(context: typer.Context, **values: Any) -> None:
        run(ServeOptions(**values), {name for name in values if _was_typed(context, name)})

    hints = get_type_hints(ServeOptions, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("context", kind, annotation=typer.Context)]
    for each in fields(ServeOptions):
        parameters.append(
            inspect.Parameter(each.name, kind, default=each.default, annotation=hints[each.name])
        )
    serve.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # typer reads it
    serve.__doc__ = run.__doc__
    return serve


def _was_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def run(options: ServeOptions, given: Collection[str]) -> None:
    """Load a server with a closed loop of streams, or with requests that come when they are due (--rate, --trace)."""
    try:
        _refuse_contradictions(options, given)
        work, level, most = _workload(options)
    except ValueError as error:
        raise fail(error) from None
    except OSError as error:
        raise fail(f"{error.filename}: {error.strerror}") from None
    bench = ServeBench(
        options.url,
        work,
        options.names,
        options.api_key,
        options.endpoint,
        None if work.is_open else options.duration or None,
        None if options.warmup < 0 else options.warmup,
        options.temperature,
        options.top_p,
        options.tokenizer,
        options.check,
        Timeouts(read=options.timeout),
        options.server,
        most,
        level,
    )
    measure(bench, options.json_file, options.html)


def _refuse_contradictions(options: ServeOptions, given: Collection[str]) -> None:
    if options.check and options.temperature > 0:
        raise ValueError("--check compares greedy answers: leave --temperature at 0")
    if options.duration and options.requests:
        raise ValueError("--duration and --requests both say when to end: give one of them")
    said = [name for name in SAID_BY_A_SETTING if name in given] if options.setting else []
    if said:
        option = said[0].removesuffix("_tokens").replace("_", "-")
        raise ValueError(f"--setting says what --{option} says: give one of them")
    if "speed" in given and options.trace is None:
        raise ValueError("--speed is that of a trace: name one with --trace")
    if "cv" in given and not options.rate:
        raise ValueError("--cv is that of arrivals: give their --rate")


def _workload(options: ServeOptions) -> tuple[Workload, ServiceLevel | None, int | None]:
    """Return workload, service level and how many adapters a setting speaks of. Raises ValueError, OSError."""
    level = ServiceLevel.parse(options.goodput) if options.goodput else None
    sizes = Range.parse(options.input_tokens), Range.parse(options.output_tokens)
    popularity, most = Popularity.parse(options.popularity), None
    count = options.requests or REQUESTS_PER_STREAM * options.streams
    lows = sizes[0].low, sizes[1].low
    work = Workload(options.streams, popularity, *lows, count, options.prompts, options.seed)
    if options.setting is not None:
        named = Setting.parse(options.setting)
        work = replace(
            work,
            streams=named.streams,
            popularity=named.popularity,
            requests=named.requests,
            lengths=named.lengths,
            arrivals=named.arrivals,
        )
        return work, level, named.adapters
    arrivals = Arrivals(options.rate, options.cv) if options.rate else None
    recorded = () if options.trace is None else _recorded(options)
    if arrivals is not None and options.duration:
        count = max(1, int(options.rate * options.duration))
    elif recorded and not options.requests:
        count = len(recorded)
    varied = any(each.high != each.low for each in sizes)
    lengths = Uniform(*sizes) if varied else None
    return replace(work, requests=count, lengths=lengths, arrivals=arrivals, trace=recorded), level, most


def _recorded(options: ServeOptions) -> tuple[Recorded, ...]:
    """Return the trace's requests, those of the first ``duration`` seconds of the run if that is above 0."""
    count = by_letters
    if options.tokenizer is not None:
        from manylora.adapters.tokenizer import load_tokenizer

        loaded = load_tokenizer(options.tokenizer)

        def count(text: str) -> int:
            return len(loaded.encode(text))

    assert options.trace is not None
    found = [
        each if each.at is None else replace(each, at=each.at / options.speed)
        for each in read_trace(options.trace, count)
    ]
    ends = options.duration
    return tuple(each for each in found if not ends or each.at is None or each.at < ends)


def measure(bench: ServeBench, json_file: Path | None, html: Path | None) -> None:
    """Measure, print, and write what was asked for."""
    from manylora.loadtest.bench.live import watching
    from manylora.loadtest.bench.serve import run_serve
    from manylora.loadtest.bench.serve_page import NoPlots, serve_page
    from manylora.loadtest.bench.serve_report import ServeReport
    from manylora.loadtest.bench.server_look import BenchError

    try:
        with watching(stdout) as watcher:
            measured = asyncio.run(run_serve(bench, watcher))
    except (BenchError, ValueError, OSError) as error:
        raise fail(error) from None
    report = ServeReport.of(bench, measured)
    stdout.print(report.text(), markup=False)
    write_json(json_file, report.to_json())
    if html is not None:
        try:
            html.write_text(serve_page(report), encoding="utf-8")
        except NoPlots as error:
            raise fail(error) from None
        except OSError as error:
            raise fail(f"--html {html}: {error.strerror}") from None
    if report.exit_status:
        raise typer.Exit(report.exit_status)


serve = _typed()
