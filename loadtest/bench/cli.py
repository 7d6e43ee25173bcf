"""`manylora bench`: the options of each benchmark, and nothing else. Bad input is one line and exit status 2."""

from pathlib import Path
from typing import Annotated

import typer

from manylora.loadtest.bench.compare_command import compare
from manylora.loadtest.bench.kernels_command import kernels
from manylora.loadtest.bench.options import (
    Adapters,
    Device,
    Dtype,
    Input,
    Json,
    Output,
    PopularityName,
    PromptCount,
    Quantization,
    Rank,
    Requests,
    Seed,
    Source,
    Streams,
    Temperature,
    Threads,
    TopP,
    fail,
    stdout,
    workload,
    write_json,
)
from manylora.loadtest.bench.peers.command import peers
from manylora.loadtest.bench.popularity import MIXTURE
from manylora.loadtest.bench.serve_command import serve

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
app.command("serve")(serve)
app.command("compare")(compare)
app.command("kernels")(kernels)
app.command("peers")(peers)


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
