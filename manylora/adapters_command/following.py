"""A registration while the server makes it: begun, uploaded where need be, and followed with a bar until it is over."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from manylora.adapters.errors import AdapterError
from manylora.adapters.sending import opened_parts
from manylora.adapters_command.server import AskedServer, Refused, path_of
from manylora.adapters_command.shown import Shown, is_registration, say, stage
from manylora.failing import fail

NOT_SEEN = ("adapter_not_found", "adapter_path_forbidden")
"""A server that says so of a directory doesn't see it, or may not read it there: then it is sent."""
POLL_SECONDS = 0.2
UNDER_WAY = ("waiting", "downloading", "copying", "checking", "loading")
WITHOUT_WAITING = {"wait": "false"}


@dataclass(frozen=True, slots=True)
class Registration:
    """What is asked for: a request that has the adapter's source or files, and these fields beside them."""

    method: str
    path: str
    fields: Mapping[str, object]

    def body(self, **more: object) -> dict[str, object]:
        """Return the fields of the request."""
        return {**self.fields, **more}


def begin(server: AskedServer, wanted: Registration, source: str) -> dict[str, Any]:
    """Ask for it and return the server's first answer; a directory of this machine is uploaded if need be.

    It needs no token, which may be there for other sources.
    """
    local = Path(source).expanduser()
    if not local.is_dir():
        return server.get(wanted.method, wanted.path, wanted.body(src=source), params=WITHOUT_WAITING)
    wanted = replace(wanted, fields={key: value for key, value in wanted.fields.items() if key != "token"})
    if server.is_here:
        try:
            # Waited for: what is on this disk is soon read, and only then is known whether it may be.
            return server.ask(wanted.method, wanted.path, wanted.body(src=str(local.resolve())))
        except Refused as refused:
            if refused.code not in NOT_SEEN:
                raise fail(refused.message) from None
    return _upload(server, wanted, local)


def _upload(server: AskedServer, wanted: Registration, directory: Path) -> dict[str, Any]:
    form = {key: "true" if value is True else value for key, value in wanted.body().items()}
    try:
        with opened_parts(directory) as parts, _bar() as bar:
            total = sum(Path(file.name).stat().st_size for _, (_, file) in parts)
            task = bar.add_task("sending", total=total)
            files = [(field, (name, _Counted(file, bar, task))) for field, (name, file) in parts]
            return server.get(
                wanted.method, wanted.path, None, data=form, files=files, params=WITHOUT_WAITING
            )
    except AdapterError as error:
        raise fail(f"{directory}: {error}") from None
    except OSError as error:
        raise fail(f"{error.filename or directory}: {error.strerror}") from None


class _Counted:
    """A file that tells a bar how much of it has been read."""

    def __init__(self, file: BinaryIO, bar: Progress, task: TaskID) -> None:
        self._file, self._bar, self._task = file, bar, task

    def read(self, size: int = -1) -> bytes:
        """Read on."""
        found = self._file.read(size)
        self._bar.advance(self._task, len(found))
        return found

    def fileno(self) -> int:
        """Return the file's, by which its length is known."""
        return self._file.fileno()


def follow(server: AskedServer, name: str, first: dict[str, Any], cancel: str) -> dict[str, Any]:
    """Wait until a registration is over, and return what is served; one that failed ends the command with why.

    ``cancel``: what to do about one that is left to go on.
    """
    found = first
    with _told_how_to_cancel(name, cancel), _bar() as bar:
        task = bar.add_task("waiting", total=None)
        while (under_way := _under_way(found)) is not None:
            bar.update(
                task,
                description=str(under_way["state"]),
                total=under_way.get("total_bytes"),
                completed=under_way.get("bytes") or 0,
            )
            time.sleep(POLL_SECONDS)
            found = server.get("GET", path_of(name))
    failed = found if is_registration(found) else found.get("registration")
    if failed is not None and failed["state"] in ("failed", "cancelled"):
        raise fail(f"{name}: {failed.get('reason') or stage(failed)}")
    return found


def _under_way(found: Shown) -> Shown | None:
    registration = found if is_registration(found) else found.get("registration")
    return registration if registration is not None and registration["state"] in UNDER_WAY else None


@contextmanager
def _told_how_to_cancel(name: str, cancel: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        say(f"the server goes on with {name}: see `manylora adapters show {name}`; {cancel}")
        raise


def _bar() -> Progress:
    stderr = Console(stderr=True, emoji=False)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(
        *columns, TimeRemainingColumn(), console=stderr, transient=True, disable=not stderr.is_terminal
    )
