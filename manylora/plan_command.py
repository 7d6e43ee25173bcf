"""`manylora plan`: what a training run needs in memory, from the base's config.json alone."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from manylora.failing import fail
from training.errors import TrainingError
from training.memory.budget import Budget, find_budget
from training.memory.find import read_shape
from training.memory.plan import PART_NAMES, MemoryPlan
from training.memory.plan import plan as plan_run
from training.memory.remedies import Remedy, remedies, smallest
from training.memory.run_shape import RunShape
from training.memory.shape import ModelShape

Flag = typer.Option


def plan(
    base: Annotated[
        str, typer.Argument(help="A model's directory, its config.json, or OWNER/MODEL of the hub.")
    ],
    method: Annotated[str, Flag(help="lora, or qlora: the base in 4 bits.")] = "lora",
    seq: Annotated[int, Flag(help="Tokens of the longest example.")] = 1024,
    batch: Annotated[int, Flag(help="Rows of a micro-batch.")] = 1,
    accumulation: Annotated[int, Flag(help="Micro-batches of an optimiser step.")] = 1,
    rank: Annotated[int, Flag(help="LoRA's rank; of one that grows, the last.")] = 64,
    targets: Annotated[
        str, Flag(help="Adapted modules, by commas or spaces; all of a layer when none are named.")
    ] = "",
    gradient_checkpointing: Annotated[
        bool, Flag(help="Keep each layer's input alone, and compute the rest again.")
    ] = False,
    dtype: Annotated[str, Flag(help="bf16, fp16 or fp32.")] = "bf16",
    optim: Annotated[str, Flag(help="Optimiser, by transformers' name.")] = "adamw_torch",
    dropout: Annotated[float, Flag(help="Dropout on the adapter's input.")] = 0.05,
    packing: Annotated[bool, Flag("--packing", help="Several examples in a row.")] = False,
    train_embeddings: Annotated[
        bool,
        Flag("--train-embeddings", help="Train embedding and head whole, as a base that learns new tokens."),
    ] = False,
    trained_share: Annotated[float, Flag(help="Share of tokens with a loss; 1 is the worst case.")] = 1.0,
    gpu: Annotated[str | None, Flag(help="Plan for a GPU with this much memory, as in 24GiB.")] = None,
    cpu: Annotated[str | None, Flag(help="Plan for a CPU with this much memory, as in 16GiB.")] = None,
    recipe: Annotated[
        str | None, Flag(help="qwen: Qwen's own finetune.py instead of `manylora train`.")
    ] = None,
    as_json: Annotated[bool, Flag("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say what a training run needs in memory, whether it fits, and what gets it in."""
    try:
        budget = find_budget(gpu, cpu, recipe)
        model = read_shape(base)
        run = RunShape(
            method=method,
            seq=seq,
            batch=batch,
            accumulation=accumulation,
            rank=rank,
            targets=tuple(targets.replace(",", " ").split()),
            gradient_checkpointing=gradient_checkpointing,
            dtype=dtype,
            optim=optim,
            packing=packing,
            train_embeddings=train_embeddings,
            dropout=dropout,
            trained_share=trained_share,
            device=budget.device,
        )
        planned = plan_run(model, run, recipe)
        found = remedies(model, run, budget.bytes, recipe)
        least = plan_run(model, smallest(model, run), recipe)
    except TrainingError as error:
        raise fail(str(error)) from None
    show = _print_json if as_json else _print_table
    show(model, run, budget, planned, found, least)


def _print_json(
    model: ModelShape,
    run: RunShape,
    budget: Budget,
    planned: MemoryPlan,
    found: tuple[Remedy, ...],
    least: MemoryPlan,
) -> None:
    typer.echo(
        json.dumps(
            {
                "total_gib": round(planned.total_gib, 4),
                "tensors_gib": round(planned.tensors_gib, 4),
                "parts": {name: round(size, 4) for name, size in planned.parts.items()},
                "budget_gib": round(budget.gib, 4),
                "fits": planned.total_gib <= budget.gib,
                "remedies": [
                    {
                        "changes": list(each.changes),
                        "total_gib": round(each.total_gib, 4),
                        "flags": each.flags,
                        "sentence": each.sentence,
                        "run": asdict(each.run),
                    }
                    for each in found
                ],
                "least_gib": round(least.total_gib, 4),
                "model": {**asdict(model), "parameters": model.parameters},
                "run": asdict(run),
            },
            indent=2,
        )
    )


def _print_table(
    model: ModelShape,
    run: RunShape,
    budget: Budget,
    planned: MemoryPlan,
    found: tuple[Remedy, ...],
    least: MemoryPlan,
) -> None:
    console = Console(soft_wrap=True, highlight=False)
    table = Table("part", "GiB", "what it is")
    table.columns[1].justify = "right"
    for name, size in planned.parts.items():
        table.add_row(name, f"{size:.2f}", PART_NAMES[name])
    table.add_row("[bold]total[/]", f"[bold]{planned.total_gib:.2f}[/]", "at the peak", end_section=True)
    console.print(table)
    held = model.quantization or ("nf4" if run.method == "qlora" else run.dtype)
    console.print(
        f"{model.family}, {model.parameters / 1e9:.2f} B parameters in {held}; rank {run.rank}, {run.batch} rows of "
        f"{run.seq} tokens, accumulation {run.accumulation}"
    )
    room = f"{budget.gib:.1f} GiB ({escape(budget.source)})"
    if planned.total_gib <= budget.gib:
        spare = budget.gib - planned.total_gib
        console.print(
            f"[bold green]It fits[/] into {budget.gib:.1f} GiB ({escape(budget.source)}), {spare:.1f} to spare."
        )
        return
    console.print(f"[bold red]It does not fit[/] into {room}: {planned.total_gib - budget.gib:.1f} too much.")
    if not found:
        console.print(
            f"Nothing gets it in: with every remedy it is {least.total_gib:.1f} GiB. Take a smaller base."
        )
        return
    console.print("What gets it in, cheapest first:")
    for number, each in enumerate(found, 1):
        console.print(
            f"  {number}. {escape(each.sentence)}: [bold]{each.total_gib:.1f} GiB[/]\n     {escape(each.flags)}"
        )
