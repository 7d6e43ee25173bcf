"""`manylora bench`: the options of each benchmark, and nothing else. Bad input is one line and exit status 2."""

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from manylora.loadtest.bench.popularity import MIXTURE, NAMES, Popularity
from manylora.loadtest.bench.workload import REQUESTS_PER_STREAM, Workload

if TYPE_CHECKING:
    from manylora.loadtest.bench.serve import ServeBench

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
stderr = Console(stderr=True, soft_wrap=True, highlight=False)
stdout = Console(soft_wrap=True, highlight=False)

Streams = Annotated[int, typer.Option(min=1, help="Clients, each of which has one request under way.")]
PopularityName = Annotated[
    str,
    typer.Option(
        "--popularity", "--distribution", help=f"Which adapter a request names: {', '.join(NAMES)}."
    ),
]
Input = Annotated[int, typer.Option("--input", min=1, help="Tokens of each prompt, about.")]
Output = Annotated[int, typer.Option("--output", min=1, help="Tokens of each answer.")]
Requests = Annotated[
    int, typer.Option(min=0, help=f"Requests that count; 0: {REQUESTS_PER_STREAM} for each stream.")
]
PromptCount = Annotated[int, typer.Option(min=0, help="Different prompts; 0: one for each request.")]
Seed = Annotated[int, typer.Option(help="Seed of popularity, prompts and sampling.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write settings, environment and figures here.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus, when the temperature isn't 0.")]
Adapters = Annotated[int, typer.Option(min=0, help="Adapters on all linear layers; 0: the base alone.")]
Rank = Annotated[int, typer.Option(min=1, help="Rank of each adapter.")]
Source = Annotated[
    str, typer.Option("--model", help="A shape of random weights, or a checkpoint's directory.")
]
Quantization = Annotated[Literal["nf4", "none"], typer.Option(help="How the linear layers are held.")]
Dtype = Annotated[Literal["bfloat16", "float32"], typer.Option(help="Type of activations and other weights.")]
Device = Annotated[str, typer.Option(help="cpu, or cuda.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads of torch; 0: as torch chooses.")]


def fail(message: object) -> typer.Exit:
    """Print one line and return the exit to raise."""
    stderr.print(f"[bold red]manylora bench:[/] {escape(' '.join(str(message).split()))}")
    return typer.Exit(2)


def workload(
    streams: int, popularity: str, sizes: tuple[int, int], requests: int, prompts: int, seed: int
) -> Workload:
    """Return the checked workload, or fail."""
    try:
        chosen = Popularity.parse(popularity)
        return Workload(streams, chosen, *sizes, requests or REQUESTS_PER_STREAM * streams, prompts, seed)
    except ValueError as error:
        raise fail(error) from None


def write_json(path: Path | None, report: dict[str, object]) -> None:
    """Write a report where it was asked for."""
    if path is not None:
        try:
            path.write_text(json.dumps(report, indent=2) + "\n")
        except OSError as error:
            raise fail(f"--json {path}: {error.strerror}") from None


@app.command("serve")
def serve(
    url: Annotated[str, typer.Option(help="The server, with or without /v1.")] = "http://127.0.0.1:8000",
    streams: Streams = 8,
    popularity: PopularityName = "uniform",
    adapters: Annotated[str, typer.Option(help="Model names, a,b,…; none: as the server lists.")] = "",
    input_tokens: Input = 64,
    output_tokens: Output = 64,
    requests: Requests = 0,
    duration: Annotated[float, typer.Option(min=0, help="Seconds to ask for, instead of --requests.")] = 0,
    warmup: Annotated[int, typer.Option(min=-1, help="Requests before; -1: two for each stream.")] = -1,
    prompts: PromptCount = 0,
    seed: Seed = 0,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    api_key: Annotated[str | None, typer.Option(envvar="MANYLORA_BENCH_API_KEY", help="Bearer key.")] = None,
    endpoint: Annotated[Literal["completions", "chat"], typer.Option(help="Which to ask.")] = "completions",
    tokenizer: Annotated[Path | None, typer.Option(help="Directory that counts prompts' tokens.")] = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds of silence that are too many.")] = 120.0,
    check: Annotated[bool, typer.Option("--check", help="Compare with answers given alone.")] = False,
    json_file: Json = None,
) -> None:
    """Load any OpenAI-compatible server with a closed loop of streams."""
    from manylora.loadtest.bench.serve import ServeBench
    from manylora.loadtest.material.http_client import Timeouts

    if check and temperature > 0:
        raise fail("--check compares greedy answers: leave --temperature at 0")
    if duration and requests:
        raise fail("--duration and --requests both say when to end: give one of them")
    work = workload(streams, popularity, (input_tokens, output_tokens), requests, prompts, seed)
    names = tuple(name.strip() for name in adapters.split(",") if name.strip())
    times, warm = Timeouts(read=timeout), None if warmup < 0 else warmup
    sampling = (temperature, top_p)
    bench = ServeBench(
        url, work, names, api_key, endpoint, duration or None, warm, *sampling, tokenizer, check, times
    )
    _run_serve(bench, json_file)


def _run_serve(bench: "ServeBench", json_file: Path | None) -> None:
    from manylora.loadtest.bench.live import watching
    from manylora.loadtest.bench.serve import BenchError, run_serve
    from manylora.loadtest.bench.serve_report import ServeReport

    try:
        with watching(stdout) as watcher:
            measured = asyncio.run(run_serve(bench, watcher))
    except (BenchError, ValueError, OSError) as error:
        raise fail(error) from None
    report = ServeReport.of(bench, measured)
    stdout.print(report.text(), markup=False)
    write_json(json_file, report.to_json())
    if report.exit_status:
        raise typer.Exit(report.exit_status)


@app.command("engine")
def engine(
    model: Source = "qwen2.5-0.5b",
    quantization: Quantization = "nf4",
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
    threads: Threads = 0,
    streams: Streams = 32,
    adapters: Adapters = 8,
    rank: Rank = 16,
    popularity: PopularityName = "uniform",
    input_tokens: Input = 64,
    output_tokens: Output = 64,
    requests: Requests = 0,
    prompts: PromptCount = 0,
    seed: Seed = 0,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.9,
    json_file: Json = None,
) -> None:
    """Run the engine without HTTP, and show where a step's time goes."""
    from manylora.loadtest.bench.engine import EngineBench, run_engine
    from manylora.loadtest.bench.local_report import engine_json, engine_text
    from manylora.loadtest.material.random_model import ModelChoice

    work = workload(streams, popularity, (input_tokens, output_tokens), requests, prompts, seed)
    _refuse_mixtures(popularity)
    _set_threads(threads)
    try:
        choice = ModelChoice(model, quantization, dtype, device)
        bench = EngineBench(choice, work, adapters, rank, temperature, top_p)
        result = run_engine(bench)
    except (ValueError, RuntimeError, OSError) as error:
        raise fail(error) from None
    stdout.print(engine_text(bench, result), markup=False)
    write_json(json_file, engine_json(bench, result))


@app.command("peft")
def peft(
    model: Source = "qwen2.5-0.5b",
    quantization: Quantization = "nf4",
    dtype: Dtype = "bfloat16",
    device: Device = "cpu",
    threads: Threads = 0,
    streams: Streams = 8,
    adapters: Adapters = 8,
    adapter: Annotated[list[Path] | None, typer.Option(help="PEFT directory, instead of noise.")] = None,
    rank: Rank = 16,
    popularity: PopularityName = "distinct",
    input_tokens: Input = 64,
    output_tokens: Output = 64,
    requests: Requests = 0,
    prompts: PromptCount = 0,
    seed: Seed = 0,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    json_file: Json = None,
) -> None:
    """Run transformers + peft (+ bitsandbytes) with one adapter a row, on the same shapes or files."""
    from manylora.loadtest.bench.local_report import peft_json, peft_text
    from manylora.loadtest.bench.peft import PeftBench, run_peft
    from manylora.loadtest.material.random_model import ModelChoice

    work = workload(streams, popularity, (input_tokens, output_tokens), requests, prompts, seed)
    _refuse_mixtures(popularity)
    _set_threads(threads)
    try:
        choice = ModelChoice(model, quantization, dtype, device)
        bench = PeftBench(choice, work, adapters, rank, tuple(adapter or ()), temperature, top_p)
        result = run_peft(bench)
    except ImportError as error:
        raise fail(f"{error.name} is not installed: pip install 'manylora[peft]'") from None
    except (ValueError, RuntimeError, OSError) as error:
        raise fail(error) from None
    stdout.print(peft_text(bench, result), markup=False)
    write_json(json_file, peft_json(bench, result))


def _refuse_mixtures(popularity: str) -> None:
    if popularity == MIXTURE:
        raise fail(f"--popularity {MIXTURE} is for a server: manylora bench serve")


def _set_threads(threads: int) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    app()
