"""`manylora merge`: bakes an adapter into its base, checks the result, and says what it is like."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from manylora.failing import fail

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "B": 1}
NAMES = {"16bit": "the 16-bit weights", "dequantized": "the dequantised 4-bit weights"}
stderr = Console(stderr=True, highlight=False)


Positional = Annotated[
    list[str] | None, typer.Argument(metavar="[ADAPTER] [OUTPUT]", help="The same as the two options.")
]
Adapter = Annotated[str | None, typer.Option("--adapter", help="Directory of the PEFT adapter.")]
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
        help="merged: a whole checkpoint; merged-4bit: the same in NF4; peft: the adapter alone, .tar.gz or .zip.",
    ),
]
IntoName = Annotated[
    str,
    typer.Option(
        "--into",
        help="16bit: the base's 16-bit weights; dequantized: its 4-bit ones, as served; auto: 16bit if at hand.",
    ),
]
Dtype = Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or float32; auto: the base's.")]
Base16 = Annotated[
    str | None, typer.Option("--base-16bit", help="16-bit weights of a base that is NF4, GPTQ or AWQ.")
]
Samples = Annotated[
    Path | None, typer.Option("--samples", help="JSON, JSONL or text rows whose loss is compared too.")
]
ShardSize = Annotated[str, typer.Option("--shard-size", help="Largest file of weights.")]
DoubleQuant = Annotated[
    bool, typer.Option("--double-quant", help="NF4 with 8-bit scales, as served and as written.")
]
ServedDense = Annotated[
    bool, typer.Option("--served-dense", help="The 16-bit base is served as it is, not as NF4.")
]
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
    double_quant: DoubleQuant = False,
    served_dense: ServedDense = False,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base, or pack it up. The result is checked before it is there."""
    directory, target = _named(positional or [], adapter, output)
    options = {
        "format": export_format,
        "into": into,
        "dtype": dtype,
        "samples": samples,
        "double_quant": double_quant,
        "served_dense": served_dense,
        "shard_bytes": _bytes(shard_size),
    }
    if export_format != "peft":
        options |= _bases(directory, base, base_16bit)
    manifest = _export(directory, target, options)
    if as_json:
        Console().print_json(data=manifest)
    else:
        _say(target, manifest)


def _export(adapter: Path, output: Path, options: dict[str, Any]) -> Any:
    """Run the export and return its manifest."""
    from manylora.adapters.errors import AdapterError
    from manylora.adapters.export.export import export
    from manylora.adapters.export.memory import return_freed_memory
    from manylora.adapters.export.settings import ExportSettings
    from manylora.quant.errors import QuantError

    return_freed_memory()
    try:
        settings = ExportSettings(adapter=adapter, output=output, **options)
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


def _named(positional: list[str], adapter: str | None, output: Path | None) -> tuple[Path, Path]:
    """Return adapter and output, each given by its flag or, in that order, without one."""
    left = list(positional)
    if adapter is None and left:
        adapter = left.pop(0)
    if output is None and left:
        output = Path(left.pop(0))
    if left:
        raise fail(f"{left[0]!r}: adapter and output are named already")
    if adapter is None or output is None:
        raise fail("name both: manylora merge --adapter DIR --output DIR [--base DIR]")
    directory, target = (Path(os.path.expanduser(each)) for each in (adapter, output))  # never raises
    if not directory.is_dir():
        raise fail(f"--adapter {adapter}: there is no such directory")
    return directory, target


def _bases(adapter: Path, base: str | None, base_16bit: str | None) -> dict[str, Any]:
    """Return the bases' directories and the base's name, which the adapter tells if nothing else does."""
    from manylora.adapters.files import read_json_object
    from manylora.adapters.spec import CONFIG_FILE
    from manylora.base import DEMO, find_base
    from manylora.server.model.errors import ModelMissing

    try:
        if base is None:
            config = read_json_object(adapter / CONFIG_FILE)
            base = str(config.get("base_model_name_or_path") or "")
            if not base:
                raise fail(f"{adapter / CONFIG_FILE} names no base: give it with --base")
            if base == "manylora/demo-base":
                base = str(DEMO / "base")
        found: dict[str, Any] = {"base": find_base(base)}
        if base_16bit is not None:
            found["base_16bit"] = find_base(base_16bit)
    except ModelMissing as error:
        raise fail(f"--base: {error}") from None
    except OSError as error:
        raise fail(f"{error.filename}: {error.strerror}") from None
    return {**found, "base_name": None if Path(base).is_dir() else base}


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


def _say(output: Path, manifest: Any) -> None:  # JSON, checked where it was made
    console = Console(highlight=False, soft_wrap=True)
    if manifest["format"] == "peft":
        console.print(f"[bold]{escape(str(output))}[/] holds {', '.join(manifest['files'])}")
        return
    served, logits, loss = manifest["served"], manifest["logits"], manifest["loss"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row(
        "merged", f"{manifest['adapter']['method']}, into {NAMES[manifest['into']]}, {manifest['dtype']}"
    )
    table.add_row(
        "beside base + adapter",
        f"logits {logits['relative']:.2g} apart (tolerance {logits['tolerance']:g}; the adapter moves them by"
        f" {manifest['adapter_effect']['relative']:.2g}), {logits['top1']:.0%} same most likely token",
    )
    table.add_row(
        "change that survived", f"{manifest['change_kept']:.2%} of {len(manifest['change'])} matrices'"
    )
    if loss is not None:
        losses = ", ".join(f"{name} {loss[name]:.4f}" for name in ("base", "adapter", "merged"))
        table.add_row("loss on the samples", losses)
    distances = ", ".join(f"{into} {found['relative']:.2g}" for into, found in served["distance"].items())
    table.add_row(
        "nearer to what is served", f"{NAMES[served['nearer']]} (distance of a merge into {distances})"
    )
    if manifest["head"] == "untied by this merge":
        table.add_row("head", "untied: the adapter made it differ from the embedding")
    for note in manifest["base"]["notes"]:
        table.add_row("note", escape(note))
    console.print(f"[bold]{escape(str(output))}[/]")
    console.print(table)
    console.print(f"Serve it: manylora serve {escape(str(output))}")
