"""`manylora plan`: what a training run needs in memory, from the base's config.json alone."""

import json
from dataclasses import asdict, replace
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from manylora.failing import fail
from manylora.training.bases.settings import LoraSettings
from manylora.training.errors import InvalidArgument, TrainingError
from manylora.training.memory.adapted import unused_ranks
from manylora.training.memory.budget import Budget, find_budget
from manylora.training.memory.find import read_shape
from manylora.training.memory.plan import PART_NAMES, MemoryPlan
from manylora.training.memory.plan import plan as plan_run
from manylora.training.memory.remedies import Remedy, remedies, smallest
from manylora.training.memory.run_shape import RunShape
from manylora.training.memory.shape import ModelShape

Flag = typer.Option
Base = Annotated[str, typer.Argument(help="A model's directory, its config.json, or OWNER/MODEL of the hub.")]
Method = Annotated[str, Flag(help="lora, or qlora: the base in 4 bits.")]
DoubleQuant = Annotated[
    bool, Flag("--double-quant", help="With qlora: NF4's scales in 8 bits, as --double_quant trains.")
]
Seq = Annotated[int, Flag(help="Tokens of the longest example.")]
Batch = Annotated[int, Flag(help="Rows of a micro-batch.")]
Accumulation = Annotated[int, Flag(help="Micro-batches of an optimiser step.")]
Rank = Annotated[int, Flag(help="LoRA's rank; of one that grows, the last.")]
RankPattern = Annotated[
    str,
    Flag(help="Ranks of their own, as an adapter's rank_pattern has them: down_proj=128,q_proj=8."),
]
UseDora = Annotated[bool, Flag("--use-dora", help="DoRA, as --use_dora trains.")]
Init = Annotated[
    str, Flag(help="As --init_lora_weights: pissa and olora keep their start beside the factors.")
]
Targets = Annotated[
    str, Flag(help="Adapted modules, by commas or spaces; all of a layer when none are named.")
]
Checkpointing = Annotated[
    bool,
    Flag(
        "--gradient-checkpointing/--no-gradient-checkpointing",
        help="Keep each layer's input alone, and compute the rest again.",
    ),
]
Dtype = Annotated[str, Flag(help="bf16, fp16 or fp32.")]
Optim = Annotated[str, Flag(help="Optimiser, by transformers' name.")]
Dropout = Annotated[float, Flag(help="Dropout on the adapter's input.")]
Packing = Annotated[bool, Flag("--packing", help="Several examples in a row.")]
Embeddings = Annotated[
    bool,
    Flag("--train-embeddings", help="Train embedding and head whole, as a base that learns new tokens."),
]
EvalSeq = Annotated[int, Flag(help="Tokens of the longest held-out example; 0: no evaluation.")]
EvalBatch = Annotated[int, Flag(help="Rows of an evaluation batch.")]
AnswerTokens = Annotated[
    int,
    Flag(help="With --eval_answers: tokens of the longest prompt and its answer; 0: no answers."),
]
Answers = Annotated[int, Flag(help="How many answers --eval_answers asks for.")]
Share = Annotated[float, Flag(help="Share of tokens with a loss; 1 is the worst case.")]
Gpu = Annotated[str | None, Flag(help="Plan for a GPU with this much memory, as in 24GiB.")]
Cpu = Annotated[str | None, Flag(help="Plan for a CPU with this much memory, as in 16GiB.")]
Recipe = Annotated[str | None, Flag(help="qwen: Qwen's own finetune.py instead of `manylora train`.")]
AsJson = Annotated[bool, Flag("--json", help="Print the plan as JSON.")]


def plan(
    base: Base,
    method: Method = "lora",
    double_quant: DoubleQuant = False,
    seq: Seq = 1024,
    batch: Batch = 1,
    accumulation: Accumulation = 1,
    rank: Rank = 64,
    rank_pattern: RankPattern = "",
    targets: Targets = "",
    gradient_checkpointing: Checkpointing = False,
    dtype: Dtype = "bf16",
    optim: Optim = "adamw_torch",
    dropout: Dropout = 0.05,
    use_dora: UseDora = False,
    init_lora_weights: Init = "default",
    packing: Packing = False,
    train_embeddings: Embeddings = False,
    trained_share: Share = 1.0,
    eval_seq: EvalSeq = 0,
    eval_batch: EvalBatch = 8,
    answer_tokens: AnswerTokens = 0,
    answers: Answers = 64,
    gpu: Gpu = None,
    cpu: Cpu = None,
    recipe: Recipe = None,
    as_json: AsJson = False,
) -> None:
    """Say what a training run needs in memory, whether it fits, and what gets it in."""
    names = tuple(targets.replace(",", " ").split())
    try:
        budget = find_budget(gpu, cpu, recipe)
        run = RunShape(method, seq, batch, accumulation, rank, names, gradient_checkpointing, dtype, optim)
        run = replace(run, packing=packing, train_embeddings=train_embeddings, dropout=dropout)
        run = replace(run, trained_share=trained_share, device=budget.device, eval_batch=eval_batch)
        run = replace(run, eval_seq=eval_seq, answer_tokens=answer_tokens, answers=answers)
        run = replace(run, double_quant=double_quant, rank_pattern=_pattern(rank_pattern), use_dora=use_dora)
        answer = _answer(base, _with_start(run, init_lora_weights), budget, recipe)
    except TrainingError as error:
        raise fail(str(error)) from None
    (_print_json if as_json else _print_table)(*answer)


def _answer(
    base: str, run: RunShape, budget: Budget, recipe: str | None
) -> tuple[ModelShape, RunShape, Budget, MemoryPlan, tuple[Remedy, ...], MemoryPlan]:
    """Return what is printed, in its order."""
    _check_recipe(run, recipe)
    model = read_shape(base)
    _check_pattern(model, run)
    planned = plan_run(model, run, recipe)
    found = remedies(model, run, budget.bytes, recipe)
    return model, run, budget, planned, found, plan_run(model, smallest(model, run), recipe)


_NAMED_OTHERWISE = (
    ("--use_dora", "--use-dora"),
    ("--init_lora_weights", "--init-lora-weights"),
    ("--lora_dropout", "--dropout"),
)


def _pattern(text: str) -> tuple[tuple[str, int], ...]:
    """Read down_proj=128,q_proj=8. Raises InvalidArgument."""
    pairs = []
    for word in text.replace(",", " ").split():
        key, _, rank = word.rpartition("=")
        if not key or not rank.isdecimal():
            raise InvalidArgument(f"--rank-pattern: {word!r} is no NAME=RANK, as in down_proj=128,q_proj=8.")
        pairs.append((key, int(rank)))
    return tuple(pairs)


def _check_pattern(model: ModelShape, run: RunShape) -> None:
    unused = unused_ranks(model, run)
    if unused:
        raise InvalidArgument(
            f"--rank-pattern: no adapted matrix of this base is meant by {', '.join(unused)}, expected some of "
            f"{', '.join(dict.fromkeys(name for name, _, _ in model.adapted(run.targets)))}."
        )


def _with_start(run: RunShape, init: str) -> RunShape:
    """Return the run with what the factors start from. Raises InvalidArgument for what training refuses too."""
    try:
        lora = LoraSettings(run.rank, dropout=run.dropout, use_dora=run.use_dora, init=init)
    except InvalidArgument as error:
        words = str(error)
        for trained, planned in _NAMED_OTHERWISE:
            words = words.replace(trained, planned)
        raise InvalidArgument(words) from None
    if run.double_quant and run.method != "qlora":
        raise InvalidArgument("--double-quant is about NF4's scales: add --method qlora, or leave it out.")
    return replace(run, dropout=lora.used_dropout, starts_from_base=lora.starts_from_base)


def _check_recipe(run: RunShape, recipe: str | None) -> None:
    if recipe is not None and (run.eval_seq or run.answer_tokens):
        raise InvalidArgument(
            f"--recipe {recipe} is planned without evaluation: leave --eval-seq and --answer-tokens out."
        )
    if recipe is not None and (run.double_quant or run.use_dora or run.starts_from_base):
        raise InvalidArgument(
            f"--recipe {recipe} is plain LoRA, and its Q-LoRA is GPTQ's: leave --double-quant, --use-dora and "
            "--init-lora-weights out."
        )


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
    console = Console(emoji=False, soft_wrap=True, highlight=False)
    table = Table("part", "GiB", "what it is")
    table.columns[1].justify = "right"
    for name, size in planned.parts.items():
        table.add_row(name, f"{size:.2f}" if size >= 0.005 else "< 0.01", PART_NAMES[name])
    table.add_row("[bold]total[/]", f"[bold]{planned.total_gib:.2f}[/]", "at the peak", end_section=True)
    console.print(table)
    held = model.quantization or ("nf4" if run.method == "qlora" else run.dtype)
    console.print(
        f"{model.family}, {_count(model.parameters)} parameters in {held}; rank {run.rank}, {run.batch} rows of "
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
    console.print("What gets it in, the smallest change of results first:")
    for number, each in enumerate(found, 1):
        console.print(
            f"  {number}. {escape(each.sentence)}: [bold]{each.total_gib:.1f} GiB[/]\n     {escape(each.flags)}"
        )


def _count(parameters: int) -> str:
    """Return a number of parameters in billions or, of a small model, in millions."""
    return f"{parameters / 1e9:.2f} B" if parameters >= 10**8 else f"{parameters / 1e6:.2f} M"
