"""`manylora bench kernels` as it is typed."""

from typing import Annotated

import typer

from manylora.loadtest.bench.options import Json, fail, stdout, write_json

PARTS_HELP = "linear, head, attention or lora; repeatable."
FORMS_HELP = "nf4, int8 or bf16; repeatable."


def kernels(
    only: Annotated[list[str] | None, typer.Option(help=PARTS_HELP)] = None,
    form: Annotated[list[str] | None, typer.Option(help=FORMS_HELP)] = None,
    shape: Annotated[list[str] | None, typer.Option(help="OUTxIN of a linear layer; repeatable.")] = None,
    rows: Annotated[str, typer.Option(help="Numbers of rows.")] = "1,4,8,32,128,512",
    context: Annotated[int, typer.Option(min=1, help="Tokens that a row attends to.")] = 1024,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapters.")] = 16,
    level: Annotated[str | None, typer.Option(help="Instruction set; else the best here.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="0: one a core.")] = 0,
    times: Annotated[int, typer.Option(min=1, help="How often everything is gone through.")] = 7,
    activations: Annotated[str, typer.Option(help="Of 4- and 8-bit weights: int8 or bfloat16.")] = "int8",
    json_file: Json = None,
) -> None:
    """Rate the native kernels beside what this machine gives: GOP/s, GB/s, share of the limit."""
    from manylora.loadtest.bench import kernels as rating

    try:
        parts = _known("only", only, rating.PARTS)
        forms = _known("form", form, rating.FORMS)
        counts = tuple(int(each) for each in rows.split(","))
        if min(counts) < 1:
            raise ValueError(f"--rows {rows}: they begin at 1")
        shapes, multiplied = tuple(shape or rating.SHAPES), rating.activations_named(activations)
        bench = rating.KernelsBench(
            parts, forms, shapes, counts, times, level, threads or None, context, rank, activations=multiplied
        )
        opened, limits, rates = rating.measure(bench)
    except ValueError as error:
        raise fail(error) from None
    stdout.print(rating.kernels_text(opened, limits, rates), markup=False)
    write_json(json_file, rating.kernels_json(bench, opened, limits, rates))


def _known(option: str, given: list[str] | None, known: tuple[str, ...]) -> tuple[str, ...]:
    for each in given or ():
        if each not in known:
            raise ValueError(f"--{option} {each}: there are {', '.join(known)}")
    return tuple(given or known)
