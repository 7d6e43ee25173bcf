"""`export` and `push`: an adapter or a mixture as files here, or in a repository of a model hub."""

import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from manylora.adapters.export.errors import ExportFailed, ExportRefused
from manylora.adapters.export.publish import check_target, publishing_file
from manylora.adapters_command import completion
from manylora.adapters_command.hub import HubRefused, Repository, push_folder
from manylora.adapters_command.server import DEFAULT_URL, TIMEOUT, AdminKey, AsJson, AskedServer, Refused, Url
from manylora.adapters_command.shown import print_json, say, size
from manylora.failing import fail

SUFFIXES = {"peft": ".tar.gz", "gguf-lora": ".gguf"}
"""Of what a format is downloaded as; a model is a .tar."""
POLL_SECONDS = 0.2
PIECE = 1 << 20
Model = Annotated[
    str,
    typer.Argument(
        help="An adapter, a mixture, or a text as sql:0.7+pirate:0.3.", autocompletion=completion.names
    ),
]
Format = Annotated[
    str,
    typer.Option(
        "--format", help="peft: an archive; gguf-lora: a file for llama.cpp; merged, merged-4bit: a model."
    ),
]
Into = Annotated[str | None, typer.Option("--into", help="Of a model: 16bit or dequantized.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="bfloat16, float16 or float32.")]
Combine = Annotated[str | None, typer.Option("--combine", help="Of a mixture as one adapter: cat or svd.")]
Rank = Annotated[int | None, typer.Option("--rank", min=1, help="Of svd: the largest of the result.")]


def export(
    model: Model,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to make; it must not exist.")
    ] = None,
    export_format: Format = "peft",
    into: Into = None,
    dtype: Dtype = None,
    combine: Combine = None,
    rank: Rank = None,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Have the server export an adapter or a mixture, and download what it made."""
    target = output or Path(f"{_file_name(model)}{SUFFIXES.get(export_format, '.tar')}")
    try:
        check_target(target)
    except ExportRefused as error:
        raise fail(str(error)) from None
    server = AskedServer(url, admin_key)
    with _exported(server, _asked(model, export_format, into, dtype, combine, rank)) as job:
        _download(server, job, target)
    if as_json:
        print_json({**job, "output": str(target)})
    else:
        say(f"{target}: {model} as {export_format}, {size(target.stat().st_size)}")


def push(
    model: Annotated[
        str,
        typer.Argument(
            help="An adapter, a mixture, or a text as sql:0.7+pirate:0.3, from the server; or a directory here, as"
            " ./out/sql.",
            autocompletion=completion.names,
        ),
    ],
    repository: Annotated[str, typer.Argument(help="On the hub, as org/name; made if it isn't there.")],
    export_format: Format = "peft",
    into: Into = None,
    dtype: Dtype = None,
    combine: Combine = None,
    rank: Rank = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch; none: main.")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
    public: Annotated[
        bool, typer.Option("--public", help="For everybody to see; else it must be private.")
    ] = False,
    token: Annotated[
        str | None,
        typer.Option("--token", envvar="HF_TOKEN", help="The hub's; none: that of `hf auth login`."),
    ] = None,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    as_json: AsJson = False,
) -> None:
    """Put an adapter, or what is exported of it, into a repository of a model hub (HF_ENDPOINT): private by default."""
    asked = _asked(model, export_format, into, dtype, combine, rank)
    where = Repository(repository, revision, public=public)
    with tempfile.TemporaryDirectory(prefix="manylora-push-") as room:
        folder = _local(model, asked) or _fetched(AskedServer(url, admin_key), asked, Path(room))
        try:
            done = push_folder(folder, where, message or f"Upload {_file_name(model)}", token)
        except HubRefused as error:
            raise fail(str(error)) from None
    print_json({"repository": repository, "url": done}) if as_json else say(f"{repository}: {done}")


def _local(model: str, asked: Mapping[str, object]) -> Path | None:
    """Return the directory here that is meant; None: it is a name on the server."""
    if not model.startswith((".", "/", "~")):
        return None
    if asked != {"model": model, "format": "peft"}:
        raise fail(f"{model} is pushed as it is: --format and its like are for what the server exports")
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise fail(f"{model} is no directory")
    return folder


def _asked(
    model: str, export_format: str, into: str | None, dtype: str | None, combine: str | None, rank: int | None
) -> dict[str, object]:
    given = {"base": into, "dtype": dtype, "combine": combine, "rank": rank}
    return {"model": model, "format": export_format, **{k: v for k, v in given.items() if v is not None}}


def _file_name(model: str) -> str:
    return Path(model).name if model.startswith((".", "/", "~")) else model.replace("/", "_")[:100]


@contextmanager
def _exported(server: AskedServer, asked: dict[str, object]) -> Iterator[dict[str, Any]]:
    """Give a job that has succeeded; afterwards, however that ends, the server keeps nothing of it."""
    job = server.get("POST", "/exports", asked)
    place = f"/exports/{job['id']}"
    try:
        with _bar() as bar:
            task = bar.add_task("waiting", total=1.0)
            while job["status"] in ("queued", "running"):
                bar.update(task, description=job["stage"] or job["status"], completed=job["progress"])
                time.sleep(POLL_SECONDS)
                job = server.get("GET", place)
        if job["status"] != "succeeded":
            raise fail(f"{asked['model']}: {job['error'] or job['status']}")
        yield job
    finally:
        _forget(server, place)


def _forget(server: AskedServer, place: str) -> None:
    for _ in range(2):  # cancel, then forget; what is over is forgotten at once
        try:
            if server.ask("DELETE", place).get("deleted"):
                return
        except (Refused, typer.Exit):
            return


def _download(server: AskedServer, job: dict[str, Any], target: Path) -> None:
    place = server.place(f"/exports/{job['id']}/download")
    try:
        with (
            publishing_file(target) as path,
            httpx.stream("GET", place, headers=server.headers, timeout=TIMEOUT) as response,
            path.open("xb") as file,
            _bar() as bar,
        ):
            if response.is_error:
                raise fail(f"{place} gave {response.status_code}")
            task = bar.add_task("downloading", total=int(response.headers.get("content-length", 0)) or None)
            for piece in response.iter_bytes(PIECE):
                file.write(piece)
                bar.advance(task, len(piece))
    except httpx.HTTPError as error:
        raise fail(f"the download broke off: {error}") from None
    except (ExportRefused, ExportFailed) as error:
        raise fail(str(error)) from None
    except OSError as error:
        raise fail(f"{error.filename or target}: {error.strerror}") from None


def _fetched(server: AskedServer, asked: dict[str, object], room: Path) -> Path:
    """Return a folder with what the server exported: an archive's files, or the one file."""
    file = room / f"{_file_name(str(asked['model']))}{SUFFIXES.get(str(asked['format']), '.tar')}"
    with _exported(server, asked) as job:
        _download(server, job, file)
    folder = room / "pushed"
    folder.mkdir()
    if asked["format"] == "gguf-lora":
        file.rename(folder / file.name)
        return folder
    try:
        with tarfile.open(file) as archive:
            archive.extractall(folder, filter="data")
    except (tarfile.TarError, OSError) as error:
        raise fail(f"what the server sent is no whole archive: {error}") from None
    file.unlink()
    return next(folder.iterdir())


def _bar() -> Progress:
    stderr = Console(stderr=True, emoji=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    return Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal)
