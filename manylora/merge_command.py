"""`manylora merge`: bakes an adapter or a mixture into its base, or into one adapter, and says what it is like."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from manylora.failing import fail
from manylora.merge_parts import as_parts, read_parts
from manylora.merge_report import DEMO_NAME, say

if TYPE_CHECKING:
    from manylora.adapters.export.settings import ExportPart

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "B": 1}
stderr = Console(emoji=False, stderr=True, highlight=False)


Positional = Annotated[
    list[str] | None, typer.Argument(metavar="[ADAPTER] [OUTPUT]", help="The same as the two options.")
]
Adapter = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        help="Directory of the PEFT adapter; of a mixture DIR:0.7+DIR:0.3, or this once for each DIR:WEIGHT.",
    ),
]
Base = Annotated[
    str | None,
    typer.Option("--base", help="Directory or hub name of the base; none: the one that the adapter names."),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Directory (or archive) to make; it must not exist.")
]
FormatName = Annotated[
    str,
    typer.Option(
        "--format",
        help="merged: a whole checkpoint; merged-4bit: the same in NF4; peft: the adapter alone as an archive, or one"
        " adapter made of a mixture, as a directory or an archive; gguf-lora: one adapter as a file for llama.cpp.",
    ),
]
IntoName = Annotated[
    str,
    typer.Option(
        "--into",
        help="16bit: the base's 16-bit weights; dequantized: its 4-bit ones, as served; auto: what the adapter was"
        " trained on.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option("--dtype", help="bfloat16, float16 or float32; auto: the narrowest that keeps the change."),
]
Base16 = Annotated[
    str | None, typer.Option("--base-16bit", help="16-bit weights of a base that is NF4, GPTQ or AWQ.")
]
Samples = Annotated[
    Path | None, typer.Option("--samples", help="JSON, JSONL or text rows whose loss is compared too.")
]
ShardSize = Annotated[str, typer.Option("--shard-size", help="Largest file of weights.")]
DoubleQuant = Annotated[
    bool | None,
    typer.Option(
        "--double-quant/--no-double-quant",
        help="NF4 with 8-bit scales, as served and as written; without it: as the adapter was trained.",
        show_default=False,
    ),
]
ServedDense = Annotated[
    bool | None,
    typer.Option(
        "--served-dense/--served-nf4",
        help="The 16-bit base is served as it is, or as NF4; without it: as the adapter was trained.",
        show_default=False,
    ),
]
Combine = Annotated[
    str | None,
    typer.Option(
        "--combine",
        help="How format peft makes one adapter of a mixture. cat: exact, the rank is the sum; svd: the nearest of"
        " --rank; ties, dare_ties, dare_linear: by peft. Without it: cat.",
    ),
]
Rank = Annotated[int | None, typer.Option("--rank", help="Of svd: the largest rank of the result.")]
Density = Annotated[
    float | None,
    typer.Option("--density", help="Of ties and dare: the share of the numbers that stays, 0 to 1."),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Of dare: what it draws by. Without it: 0.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the manifest.")]


def merge(
    positional: Positional = None,
    adapter: Adapter = None,
    base: Base = None,
    output: Output = None,
    export_format: FormatName = "merged",
    into: IntoName = "auto",
    dtype: Dtype = "auto",
    base_16bit: Base16 = None,
    samples: Samples = None,
    shard_size: ShardSize = "5GB",
    double_quant: DoubleQuant = None,
    served_dense: ServedDense = None,
    combine: Combine = None,
    rank: Rank = None,
    density: Density = None,
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter or a mixture into its base, or make one adapter. The result is checked before it is there."""
    source, target = _named(positional or [], adapter or [], output)
    options: dict[str, Any] = {
        "format": export_format,
        "into": into,
        "dtype": dtype,
        "samples": samples,
        "double_quant": double_quant,
        "served_dense": served_dense,
        "shard_bytes": _bytes(shard_size),
    }
    options |= {"combine": combine, "rank": rank, "density": density, "seed": seed}
    if combine is not None:
        source = as_parts(source)
    if export_format != "peft" or (base is not None and not isinstance(source, Path)):
        options |= _bases(source, base, base_16bit)
    manifest = _export(source, target, options)
    if as_json:
        Console(emoji=False).print_json(data=manifest)
    else:
        say(target, manifest)


def _export(source: "Path | tuple[ExportPart, ...]", output: Path, options: dict[str, Any]) -> Any:
    """Run the export and return its manifest."""
    from manylora.adapters.errors import AdapterError
    from manylora.adapters.export.export import export
    from manylora.adapters.export.memory import return_freed_memory
    from manylora.adapters.export.settings import ExportSettings
    from manylora.quant.errors import QuantError

    return_freed_memory()
    try:
        whose: dict[str, Any] = (
            {"adapter": source} if isinstance(source, Path) else {"adapter": None, "parts": source}
        )
        settings = ExportSettings(output=output, **whose, **options)
        with _bars() as bars:
            task = bars.add_task("reading", total=1.0)
            report = export(
                settings, lambda doing, share: bars.update(task, description=doing, completed=share)
            )
    except (AdapterError, QuantError) as error:
        raise fail(str(error)) from None
    except OSError as error:
        raise fail(f"{error.filename or output}: {error.strerror}") from None
    return dict(report.manifest)


def _named(
    positional: list[str], adapters: list[str], output: Path | None
) -> "tuple[Path | tuple[ExportPart, ...], Path]":
    """Return what is merged and where to, each given by its flag or, in that order, without one."""
    left = list(positional)
    if not adapters and left:
        adapters = [left.pop(0)]
    if output is None and left:
        output = Path(left.pop(0))
    if left:
        raise fail(f"{left[0]!r}: adapter and output are named already")
    if not adapters or output is None:
        raise fail("name both: manylora merge --adapter DIR --output DIR [--base DIR]")
    return read_parts(adapters), Path(os.path.expanduser(output))  # never raises


def _bases(
    source: "Path | tuple[ExportPart, ...]", base: str | None, base_16bit: str | None
) -> dict[str, Any]:
    """Return the bases' directories and the base's name, which the adapters tell if nothing else does."""
    from manylora.adapters.errors import AdapterError
    from manylora.base import DEMO, find_base
    from manylora.server.model.errors import ModelMissing

    try:
        if base is None:
            base = _named_base([part.directory for part in as_parts(source)])
            if base == DEMO_NAME:
                base = str(DEMO / "base")
        found: dict[str, Any] = {"base": find_base(base)}
        if base_16bit is not None:
            found["base_16bit"] = find_base(base_16bit)
    except ModelMissing as error:
        raise fail(f"--base: {error}") from None
    except AdapterError as error:
        raise fail(str(error)) from None
    except OSError as error:
        raise fail(f"{error.filename}: {error.strerror}") from None
    return {**found, "base_name": None if Path(base).is_dir() else base}


def _named_base(adapters: list[Path]) -> str:
    """Return the base that the adapters' configs name."""
    from manylora.adapters.files import read_json_object
    from manylora.adapters.spec import CONFIG_FILE

    told = {
        str(read_json_object(adapter / CONFIG_FILE).get("base_model_name_or_path") or ""): adapter
        for adapter in adapters
    }
    if len(told) > 1:
        named = ", ".join(f"{name!r} ({adapter})" for name, adapter in told.items())
        raise fail(f"the parts name different bases, {named}: give the one that all are for with --base")
    [(base, adapter)] = told.items()
    if not base:
        raise fail(f"{adapter / CONFIG_FILE} names no base: give it with --base")
    return base


def _bytes(text: str) -> int:
    upper = text.strip().upper()
    for unit, size in UNITS.items():
        number = upper.removesuffix(unit)
        if upper.endswith(unit) and number.replace(".", "", 1).isdigit():
            return max(1, int(float(number) * size))
    raise fail(f"--shard-size {text!r} is no size; for example 5GB or 500MB")


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
    )
