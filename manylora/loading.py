"""What a server says while it loads: a bar for whoever watches, else a line now and then once it takes long."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from manylora.logs import Voice

FIRST, BETWEEN = 2.0, 5.0
"""Seconds until the first line, and from one line to the next."""
GB = 1e9

Hear = Callable[[int, int], None]
"""Takes bytes that are loaded, and all of them."""


@contextmanager
def told(name: str, voice: Voice) -> Iterator[Hear]:
    """Yield what is to be called as the loading of ``name`` goes on."""
    if not voice.watched:
        yield _lines(name, voice)
        return
    columns = (TextColumn("loading {task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=voice.console, transient=True) as bars:
        task = bars.add_task(name, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _lines(name: str, voice: Voice) -> Hear:
    due = time.monotonic() + FIRST

    def hear(done: int, total: int) -> None:
        nonlocal due
        now = time.monotonic()
        if now < due or done == total:
            return
        due = now + BETWEEN
        voice.say(f"loading {name}: {done / GB:.1f} of {total / GB:.1f} GB", loaded=done, of=total)

    return hear
