"""The pass over all rows: reads them, judges each by itself, and writes what is needed to judge them together."""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from manylora.training.check.kinds import Flag
from manylora.training.check.languages import NOT_LOOKED_AT, language_codes
from manylora.training.check.lengths import Tokenizer, token_counts
from manylora.training.check.loops import looping
from manylora.training.check.profile import Profile, compared
from manylora.training.check.reading import DataFile, example_of, rows_of
from manylora.training.check.rows import flags_of
from manylora.training.check.shingles import U32, signatures
from manylora.training.check.table import RowTable, StoredText, TextWriter
from manylora.training.check.texts import RowText, fingerprint, lenient, row_text, words_only
from manylora.training.data.example import Example
from manylora.training.data.row import Row

BLOCK = 1000
ROWS_WORTH_A_PROCESS = 25_000
MOST_PROCESSES = 8


@dataclass(frozen=True, slots=True)
class ScanJob:
    """What every process of a scan is told."""

    files: tuple[DataFile, ...]
    profile: Profile
    directory: Path
    tokenizer: Tokenizer | None
    max_length: int | None
    processes: int


def process_count(rows: int) -> int:
    """How many processes are worth their start for so many rows."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, rows // ROWS_WORTH_A_PROCESS, MOST_PROCESSES))


def scan(job: ScanJob) -> None:
    """Fill the table. Every process reads all rows, which is cheap, and judges its share of the blocks."""
    if job.processes == 1:
        _scan_share(job, 0)
        return
    # Not forked: a run that checks its data has threads by then, and locks that they hold.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(job.processes, mp_context=context) as pool:
        for done in [pool.submit(_scan_share, job, share) for share in range(job.processes)]:
            done.result()


def _scan_share(job: ScanJob, share: int) -> None:
    table = RowTable(job.directory, job.profile.rows)
    writer = TextWriter(job.directory, share)
    for start, block in _blocks(job, share):
        _judge(job, table, writer, start, block)
    writer.close()


def _blocks(job: ScanJob, share: int) -> Iterator[tuple[int, list[tuple[int, Row]]]]:
    """Yield this process's blocks of rows, each with the number of its first row."""
    block: list[tuple[int, Row]] = []
    for number, file, row in rows_of(job.files):
        if number // BLOCK % job.processes != share:
            continue
        block.append((file, row))
        if number % BLOCK == BLOCK - 1:
            yield number - number % BLOCK, block
            block = []
    if block:
        yield (job.profile.rows - 1) // BLOCK * BLOCK, block


def _judge(
    job: ScanJob, table: RowTable, writer: TextWriter, start: int, block: Sequence[tuple[int, Row]]
) -> None:
    flags = np.zeros(len(block), dtype=np.uint32)
    texts: list[RowText] = []
    stored: list[StoredText] = []
    hashes = np.zeros((4, len(block)), dtype=np.uint64)
    for index, (file, row) in enumerate(block):
        example = example_of(row, job.files[file])
        if isinstance(example, str):
            flags[index] = Flag.BROKEN
            texts.append(RowText("", "", "", chat=False))
            stored.append(StoredText("", "", example))
            continue
        text = row_text(example)
        flags[index] = flags_of(example)
        if job.profile.endings.cut_off(text):
            flags[index] |= np.uint32(Flag.CUT_OFF)
        hashes[:, index] = _hashes(example, text)
        texts.append(text)
        stored.append(StoredText(text.prompt, text.answer, ""))
    flags[looping([text.answer for text in texts])] |= np.uint32(Flag.REPEATS)
    here = slice(start, start + len(block))
    _write_lengths(job, table, here, texts, flags)
    for name, values in zip(("row", "loose", "prompt", "answer"), hashes, strict=True):
        table.column(name)[here] = values
    kept = signatures([compared(text) for text in texts], job.profile.boilerplate)
    table.column("bands")[here] = kept.bands
    table.column("sketch")[here] = kept.sketch
    table.column("flags")[here] = flags
    table.column("file")[here] = [file for file, _ in block]
    table.column("line")[here] = [row.line for _, row in block]
    table.column("number")[here] = [row.number or 0 for _, row in block]
    table.column("like")[here] = -1
    table.column("against")[here] = -1
    table.column("store")[here] = writer.store
    table.column("at")[here], table.column("size")[here] = writer.write(stored)


def _write_lengths(
    job: ScanJob,
    table: RowTable,
    here: slice,
    texts: Sequence[RowText],
    flags: U32,
) -> None:
    tokens = token_counts([text.whole for text in texts], job.tokenizer)
    if job.max_length is not None:
        flags[tokens > job.max_length] |= np.uint32(Flag.OVERLONG)
    table.column("tokens")[here] = tokens
    table.column("characters")[here] = [len(text.whole) for text in texts]
    stride = job.profile.language_stride
    looked_at = [f"{text.answer}\n{text.prompt}" for text in texts[-here.start % stride :: stride]]
    languages = np.full(len(texts), NOT_LOOKED_AT, dtype=np.uint8)
    languages[-here.start % stride :: stride] = language_codes(looked_at)
    table.column("language")[here] = languages


def _hashes(example: Example, text: RowText) -> tuple[int, int, int, int]:
    """Everything; everything's words; all before the answer, or 0 for rows without a prompt; the answer."""
    tools = repr(example.tools) if example.tools else ""
    row = fingerprint(example.to_json())
    words = words_only(f"{text.system} {text.prompt} {text.answer}")
    loose = fingerprint(words, tools) if words else row
    prompt = fingerprint(text.system, text.prompt.strip(), tools) if text.chat and text.prompt.strip() else 0
    return row, loose, prompt, fingerprint(lenient(text.answer))
