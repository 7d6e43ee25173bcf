"""What the commands of `manylora bench` share: options, how bad input is told, where a report is written."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from manylora.loadtest.bench.popularity import NAMES, Popularity
from manylora.loadtest.bench.workload import REQUESTS_PER_STREAM, Workload

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
