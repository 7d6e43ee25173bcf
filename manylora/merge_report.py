"""What `manylora merge` says once its result is there, down to the command that serves it."""

import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

NAMES = {"16bit": "the 16-bit weights", "dequantized": "the dequantised 4-bit weights"}
DEMO_NAME = "manylora/demo-base"
"""What the adapters of the demo call their base."""


def say(output: Path, manifest: Any) -> None:  # JSON, checked where it was made
    """Print what was made at ``output``."""
    console = Console(emoji=False, highlight=False, soft_wrap=True)
    if manifest["format"] == "gguf-lora":
        (_say_combined if "combine" in manifest else _say_gguf)(console, output, manifest)
        _say_how_to_load(console, output, manifest)
        return
    if "combine" in manifest:
        _say_combined(console, output, manifest)
        return
    if manifest["format"] == "peft":
        console.print(f"[bold]{escape(str(output))}[/] holds {', '.join(manifest['files'])}")
        return
    console.print(f"[bold]{escape(str(output))}[/]")
    console.print(_merged(manifest))
    console.print(f"Serve it: {escape(serve_model(output))}")


def _merged(manifest: Any) -> Table:  # JSON, as above
    served, logits, loss = manifest["served"], manifest["logits"], manifest["loss"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("merged", f"{manifest['adapter']['method']}, {manifest['dtype']}")
    table.add_row("into", f"{NAMES[manifest['into']]}: {escape(manifest['because'])}")
    table.add_row(
        "beside base + adapter",
        f"logits {logits['relative']:.2g} apart (tolerance {logits['tolerance']:g}; the adapter moves them by"
        f" {manifest['adapter_effect']['relative']:.2g}), {logits['top1']:.0%} same most likely token",
    )
    table.add_row(
        "change that survived", f"{manifest['change_kept']:.2%} of {len(manifest['change'])} matrices'"
    )
    if manifest["kept_by_dtype"]:
        shares = ", ".join(f"{name} {share:.2%}" for name, share in manifest["kept_by_dtype"].items())
        table.add_row("of it, exactly", shares)
    if manifest["in_nf4"] is not None:
        moved = manifest["in_nf4"]["relative"]
        table.add_row("if quantised again", f"NF4 would move the logits by {moved:.2g}")
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
    return table


def _say_combined(console: Console, output: Path, manifest: Any) -> None:  # JSON, as above
    console.print(f"[bold]{escape(str(output))}[/]")
    error, ranks = manifest["error"], manifest["ranks"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("combined", f"{escape(manifest['adapter']['method'])}, by {manifest['combine']}")
    smallest, largest = min(ranks.values()), manifest["rank"]
    rank = str(largest) if smallest == largest else f"{smallest} to {largest}"
    table.add_row("adapter", f"{len(ranks)} modules, rank {rank}, {manifest['dtype']}")
    table.add_row("error", f"{error['overall']:.2g} of the sum's size over all (Frobenius)")
    if manifest["combine"] != "cat":
        for module, found in error["modules"].items():
            table.add_row("", f"{escape(module)} {found:.2g} (rank {ranks[module]})")
    console.print(table)
    if output.is_dir():
        console.print(f"Serve it: {escape(serve_adapter(output, largest))}")


def _say_gguf(console: Console, output: Path, manifest: Any) -> None:  # JSON, as above
    console.print(f"[bold]{escape(str(output))}[/]")
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row(
        "adapter", f"{manifest['adapter']['method']}, {manifest['modules']} modules, {manifest['dtype']}"
    )
    table.add_row("for", f"llama.cpp's {manifest['architecture']}, its α {manifest['alpha']:g}")
    table.add_row("error", f"{manifest['error']['overall']:.2g} of the adapter's size over all (Frobenius)")
    console.print(table)


def _say_how_to_load(console: Console, output: Path, manifest: Any) -> None:  # JSON, as above
    if manifest["left_out"]:
        console.print(f"Not in it, since a gguf-lora holds factors alone: {', '.join(manifest['left_out'])}")
    line = shlex.join(["llama-server", "-m", "BASE.gguf", "--lora", str(output)])
    console.print(f"Load it beside the base in GGUF: {escape(line)}")


def serve_model(directory: Path) -> str:
    """Return the command that serves a merged model without losing any of it.

    Each is held against what `manylora serve` would do with it here, the environment's settings included.
    """
    from manylora.base import what_is_lost
    from manylora.server.config_sources import load_settings

    base: dict[str, str] = {"base": str(directory)}
    dense = {"quantization": "none"}
    for more in ({}, dense, dense | {"dtype": "float32"}):
        if not what_is_lost(load_settings(base | more), directory):
            break
    flags = [word for key, value in more.items() for word in (f"--{key}", value)]
    return shlex.join(["manylora", "serve", str(directory), *flags])


def serve_adapter(directory: Path, rank: int) -> str:
    """Return the command that serves an adapter made of others, on the base that it names as it was trained on."""
    from manylora.adapters.base_form import read_base_form
    from manylora.adapters.files import read_json_object
    from manylora.adapters.spec import CONFIG_FILE
    from manylora.server.config import ServeSettings

    named = read_json_object(directory / CONFIG_FILE).get("base_model_name_or_path")
    words = ["manylora", "serve", *([] if named == DEMO_NAME else [str(named or "BASE")])]
    form = read_base_form(directory)
    words += [] if form is None else form.serve_flags()
    if rank > ServeSettings.model_fields["max_rank"].default:
        words += ["--max-rank", str(rank)]
    return shlex.join([*words, "--adapter", f"{directory.resolve().name}={directory}"])
