"""How a batch ends: what was not answered is told so, and its answers become files, in the order of its lines."""

import contextlib
import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path

from manylora.server.batches.database import BatchDatabase
from manylora.server.batches.files import FileStore, Incoming
from manylora.server.batches.lines import lines_of, unanswered
from manylora.server.batches.records import Batch, StoredFile

AT_ONCE = 1000
"""Lines that are told in one transaction: each has the disk written to."""


def give_up_rest(
    database: BatchDatabase, batch: Batch, path: Path, largest: int, why: tuple[str, str]
) -> None:
    """Have every line that has no answer be told why (blocking)."""
    lines = lines_of(path, largest, database.answered(batch.id))
    rest = ((line.number, unanswered(line.custom_id, *why)) for line in lines)
    while some := list(islice(rest, AT_ONCE)):
        database.add_unanswered(batch.id, some)


def finish(files: FileStore, batch: Batch) -> Batch:
    """Write the files of a batch, and keep it and them at once (blocking). After a crash all of it is done again.

    Returns the batch as it is kept: one that was over before stays as it was.
    """
    made: list[Incoming] = []
    try:
        output = _written(files, made, files.database.results(batch.id, good=True))
        errors = _written(files, made, files.database.results(batch.id, good=False))
        told: list[StoredFile] = []
        over = batch
        if output is not None:
            told.append(_described(output, batch, "output"))
            over = replace(over, output_file_id=output.id)
        if errors is not None:
            told.append(_described(errors, batch, "error"))
            over = replace(over, error_file_id=errors.id)
        kept = files.database.put_batch(over, tuple(told))
    except BaseException:
        for each in made:
            each.discard()
        raise
    if not kept:
        for each in made:
            each.discard()
    with contextlib.suppress(OSError):  # it is over all the same; what is left goes at the next start
        files.drop_input(batch.id)
    return over if kept else files.database.batch(batch.id) or over


def _written(files: FileStore, made: list[Incoming], lines: Iterable[str]) -> Incoming | None:
    """Return a file of the lines, kept under its name; None: there are none."""
    incoming = None
    for line in lines:
        if incoming is None:
            incoming = files.new(bounded=False)
            made.append(incoming)
        incoming.write(line.encode())
    if incoming is not None:
        incoming.finish()
    return incoming


def _described(incoming: Incoming, batch: Batch, what: str) -> StoredFile:
    seconds = batch.output_seconds
    expires = None if seconds is None else int(time.time()) + seconds
    return incoming.described(batch.owner, f"{batch.id}_{what}.jsonl", "batch_output", expires)
