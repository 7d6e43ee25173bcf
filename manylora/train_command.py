"""`manylora train`: the training module behind the flags of Qwen's finetune.py, and the served base it asks for."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.markup import escape

from manylora.extras import need_training
from manylora.failing import fail

OF_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
"""What a disk says wherever a run writes: temporary files, plots, reports."""

if TYPE_CHECKING:
    from manylora.served_generation import ServedBase
    from manylora.training.bases.types import Base
    from manylora.training.evaluate.generate import Generate


def train(words: list[str]) -> None:
    """Train an adapter; `manylora train --help` lists the flags."""
    need_training()
    from manylora.training.quiet import quiet_libraries

    quiet_libraries()
    from manylora.training.errors import TrainingError
    from manylora.training.parsing import parse_arguments

    if not words or {"--help", "-h", "--help-all"} & set(words):
        _help(words)
        return
    try:
        if words[0] == "sweep":
            from manylora.training.rate.run_sweep import run_sweep
            from manylora.training.rate.sweep import parse_sweep

            settings, rest = parse_sweep(words[1:])
            run_sweep(parse_arguments(rest), settings, _say)
            return
        arguments = parse_arguments(words)
        from manylora.training.run import Surroundings
        from manylora.training.run import train as run

        run(arguments, Surroundings(_say, _open_generate))
    except TrainingError as error:
        raise fail(" ".join(str(error).split())) from None
    except OSError as error:
        if error.errno not in OF_DISK:
            raise
        where = f"{error.filename}: " if error.filename else ""
        raise fail(
            f"{where}{error.strerror}: make room, or mend who may write there, and start again"
        ) from None


def _help(words: list[str]) -> None:
    from manylora.training.parser import make_parser
    from manylora.training.rate.sweep import sweep_parser

    if words[:1] == ["sweep"]:
        typer.echo(sweep_parser().format_help())
        return
    typer.echo(make_parser(everything="--help-all" in words).format_help())


def _say(sentence: str) -> None:
    Console(emoji=False, stderr=True, highlight=False, soft_wrap=True).print(f"[dim]·[/] {escape(sentence)}")


@contextmanager
def _open_generate(base: "Base") -> "Iterator[Generate]":
    """Open the base as `manylora serve` would with the flags that the run's last line gives."""
    from manylora.served_generation import ServedGeneration

    with ServedGeneration(served_as_trained(base)) as generate:
        yield generate


def served_as_trained(base: "Base") -> "ServedBase":
    """Return a base as it is served with the same linear layers that it is trained on."""
    from manylora.served_generation import ServedBase

    return ServedBase(
        base.directory,
        quantization="none" if base.kind == "dense" else "nf4" if base.from_16bit else "auto",
        double_quant=base.double_quant,
        device="cuda" if base.model.device.type == "cuda" else "cpu",
    )
