"""The data check: `check_data` reads files and says what is wrong with them before a run finds out.

Three steps, each over all rows: learn what is usual (profile.py), judge every row by itself (scan.py), judge rows
together (duplicates.py). Only numbers are kept in between, in temporary files.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from manylora.training.check.duplicates import judge_together
from manylora.training.check.kinds import KINDS, Flag, flags_named
from manylora.training.check.languages import NOT_LOOKED_AT, UNKNOWN, language_name
from manylora.training.check.lengths import Tokenizer, quartile_fence
from manylora.training.check.profile import Profile, learn
from manylora.training.check.reading import DataFile, open_files
from manylora.training.check.report import CheckReport, Mix, findings_of
from manylora.training.check.scan import ScanJob, process_count, scan
from manylora.training.check.table import RowTable
from manylora.training.data.columns import Columns
from manylora.training.errors import InvalidData

RARE_LANGUAGE = 0.002
"""The share of the rows under which a language is called unusual."""
FEWEST_FOR_OUTLIERS = 200


@dataclass(frozen=True, slots=True)
class CheckSettings:
    """What to check."""

    paths: tuple[str, ...]
    eval_paths: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = None
    """Without one, lengths in tokens are estimated from characters."""
    max_length: int | None = None
    """Tokens that training reads of a row; None: no row is overlong."""
    ignore: tuple[str, ...] = ()
    """Names of kinds that aren't reported."""
    format: str | None = None
    """A format's name, of all files; None recognises each."""
    columns: Columns | None = None
    """Fields that the files name otherwise."""
    processes: int | None = None
    """None: as many as there are cores and rows are worth."""


def check_data(settings: CheckSettings) -> CheckReport:
    """Check data files.

    Raises InvalidData for a file that can't be read; InvalidArgument for a kind, format or column that there isn't.
    """
    began = time.monotonic()
    ignored = flags_named(settings.ignore)
    files = open_files(settings.paths, settings.eval_paths, settings.format, settings.columns)
    profile = learn(files)
    if not profile.rows:
        raise InvalidData(f"{', '.join(settings.paths)}: there is no row in it")
    processes = settings.processes or process_count(profile.rows)
    with tempfile.TemporaryDirectory(prefix="manylora-check-") as directory:
        table = RowTable(Path(directory), profile.rows, create=True)
        job = ScanJob(files, profile, Path(directory), settings.tokenizer, settings.max_length, processes)
        scan(job)
        evaluates = np.array([file.evaluates for file in files])[np.asarray(table.column("file"))]
        judge_together(table, evaluates, profile.shared, processes)
        _mark_outliers(table)
        flags = table.column("flags")
        flags[:] &= np.uint32(~ignored & 0xFFFFFFFF)
        report = _report(settings, files, profile, table, evaluates, time.monotonic() - began)
        table.close()
    return report


def _mark_outliers(table: RowTable) -> None:
    """Flag rows that are far longer than the others, or in a language that hardly any other is in."""
    flags, languages = table.column("flags"), np.asarray(table.column("language"))
    readable = (flags[:] & Flag.BROKEN) == 0
    tokens = np.asarray(table.column("tokens"))
    if readable.sum() < FEWEST_FOR_OUTLIERS:
        return
    flags[readable & (tokens > quartile_fence(tokens[readable]))] |= np.uint32(Flag.LENGTH_OUTLIER)
    counts = np.bincount(languages[readable & (languages != NOT_LOOKED_AT)], minlength=256)
    rare = (counts > 0) & (counts < RARE_LANGUAGE * counts.sum())
    rare[[UNKNOWN, NOT_LOOKED_AT]] = False
    flags[readable & rare[languages]] |= np.uint32(Flag.LANGUAGE_OUTLIER)


def _report(
    settings: CheckSettings,
    files: Sequence[DataFile],
    profile: Profile,
    table: RowTable,
    evaluates: NDArray[np.bool_],
    seconds: float,
) -> CheckReport:
    flags = np.asarray(table.column("flags")).copy()
    trained_on = ((flags & Flag.BROKEN) == 0) & ~evaluates
    return CheckReport(
        files=tuple(files),
        rows_per_file=profile.rows_per_file,
        findings=findings_of(table, files, KINDS),
        flags=flags,
        lengths=_length_mix(np.asarray(table.column("tokens"))[trained_on]),
        languages=_language_mix(np.asarray(table.column("language"))[trained_on]),
        estimated_lengths=settings.tokenizer is None,
        max_length=settings.max_length,
        seconds=seconds,
    )


def _length_mix(tokens: NDArray[np.uint32]) -> Mix:
    """Rows by length, in bins whose edges double with every second one."""
    if not len(tokens):
        return Mix((), ())
    steps = np.arange(2 * int(np.ceil(np.log2(int(tokens.max()) + 2))) + 1)
    edges = np.unique(np.floor(2 ** (steps / 2)).astype(np.int64))
    counts, _ = np.histogram(np.maximum(tokens, 1), bins=edges)
    return Mix(tuple(str(edge) for edge in edges[:-1]), tuple(int(count) for count in counts))


def _language_mix(languages: NDArray[np.uint8]) -> Mix:
    counts = np.bincount(languages[languages != NOT_LOOKED_AT], minlength=1)
    order = [int(code) for code in np.argsort(-counts, kind="stable") if counts[code] and code != UNKNOWN]
    names = tuple(language_name(code) for code in order)
    found = tuple(int(counts[code]) for code in order)
    unknown = int(counts[UNKNOWN])
    return Mix((*names, "can't tell"), (*found, unknown)) if unknown else Mix(names, found)
