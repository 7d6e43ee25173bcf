"""`manylora bench peers` as it is typed."""

import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import typer

from manylora.loadtest.bench.options import Json, fail, stderr, stdout, write_json
from manylora.loadtest.bench.peers.wanted import Wanted

KEEP_HELP = (
    "Directory for the model's files, which are used again where they are there; else they are removed."
)
SOURCE_HELP = "llama.cpp's source: its converters turn the files into GGUF."


def peers(
    llama_server: Annotated[Path | None, typer.Option(help="llama.cpp's server; else from the PATH.")] = None,
    llama_source: Annotated[Path | None, typer.Option(help=SOURCE_HELP)] = None,
    llama_python: Annotated[Path, typer.Option(help="The python of these.")] = Path(sys.executable),
    vllm: Annotated[
        Path | None, typer.Option(help="A python that has vllm; else that of the PATH's vllm.")
    ] = None,
    peft: Annotated[bool, typer.Option("--peft/--no-peft", help="Measure transformers + peft too.")] = True,
    scene: Annotated[
        list[str] | None, typer.Option(help='One of the lines, as "8, base"; repeatable.')
    ] = None,
    model: Annotated[str, typer.Option(help="The shape of the random model.")] = "qwen2.5-0.5b",
    quantization: Annotated[Literal["nf4", "none"], typer.Option(help="Of manylora and peft.")] = "nf4",
    tokenizer: Annotated[
        Path | None, typer.Option(help="Directory of a real tokenizer; else one is made.")
    ] = None,
    each: Annotated[int, typer.Option(min=1, help="Requests of each stream that count.")] = 3,
    threads: Annotated[int, typer.Option(min=0, help="Of llama.cpp; 0: one a core.")] = 0,
    keep: Annotated[Path | None, typer.Option(help=KEEP_HELP)] = None,
    json_file: Json = None,
) -> None:
    """Run manylora beside what is installed of llama.cpp, vLLM and peft; one table, and the ratios to the bars."""
    found = llama_server or _on_path("llama-server")
    if llama_server is not None and llama_source is None:
        raise fail("--llama-server needs --llama-source: its converters make the files")
    server = None if llama_source is None else found
    wanted = Wanted(server, llama_source, llama_python, vllm or _python_of("vllm"), peft, tuple(scene or ()))
    with ExitStack() as until_the_end:
        where = keep or Path(
            until_the_end.enter_context(tempfile.TemporaryDirectory(prefix="manylora-peers-"))
        )
        _measure(wanted, where, (model, quantization, tokenizer), each, threads, json_file)


def _measure(
    wanted: Wanted,
    where: Path,
    model: tuple[str, str, Path | None],
    each: int,
    threads: int,
    json_file: Path | None,
) -> None:
    from manylora.loadtest.bench.beside_peft import CompareError
    from manylora.loadtest.bench.peers.files import PeerError
    from manylora.loadtest.bench.peers.report import peers_json, peers_text
    from manylora.loadtest.bench.peers.run import run_peers
    from manylora.loadtest.bench.peers.setting import assemble

    try:
        setting = assemble(wanted, where, model, each, threads)
        ran = run_peers(setting, lambda line: stderr.print(line, markup=False))
    except (PeerError, CompareError, ValueError, OSError) as error:
        raise fail(error) from None
    stdout.print(peers_text(setting, ran), markup=False)
    write_json(json_file, peers_json(setting, ran))


def _on_path(name: str) -> Path | None:
    found = shutil.which(name)
    return None if found is None else Path(found)


def _python_of(name: str) -> Path | None:
    """Return the python of a script on the PATH: the one that its first line names."""
    script = _on_path(name)
    if script is None:
        return None
    first = script.read_bytes().split(b"\n", 1)[0].decode(errors="replace")
    python = Path(first.removeprefix("#!").split(" ")[0])
    return python if first.startswith("#!") and python.is_file() else None
