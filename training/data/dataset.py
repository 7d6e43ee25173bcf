"""From data files to what a trainer takes: reads, splits, tokenises, packs, and says what it found."""

import heapq
import random
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from manylora.training.data.columns import Columns
from manylora.training.data.example import Example, Source
from manylora.training.data.files import DataPath, parse_data_path, read_rows
from manylora.training.data.formats import DataFormat, format_named, recognise
from manylora.training.data.items import PackedItems
from manylora.training.data.packing import pack
from manylora.training.data.render import FastTokenizer, Rendered, Renderer
from manylora.training.data.report import DataReport, FileReport, Finding, percentiles
from manylora.training.data.store import ROWS_PER_BATCH, Directory, ExampleStore, open_tokens, tokens_writer
from manylora.training.errors import InvalidArgument, InvalidData


@dataclass(frozen=True, slots=True)
class DataSettings:
    """Which data, and how it becomes tokens."""

    paths: tuple[str, ...]
    """Each ``file`` or ``file:share``."""
    max_length: int
    packing: bool = False
    seed: int = 42
    """Of the draw that shares ask for, and of the split into train and eval."""
    format: str | None = None
    """A format's name, of all files; None recognises each."""
    columns: Columns | None = None
    """Fields that the files name otherwise."""
    system: str | None = None
    """Put before conversations without a system turn; None leaves that to the chat template."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end generation with this base; without them every control token at a turn's end counts as one."""


class TrainingData:
    """Tokenised examples. Its files are removed with it: processes that are started anew need it to be kept."""

    dataset: Any
    """Map-style: ``len`` and, by number, items of ``input_ids``, ``labels`` and, when packed, ``position_ids``.
    A ``datasets.Dataset`` unless packed. Unpacked, item i is example i."""
    report: DataReport
    lengths: "array[int]"
    """Tokens of every item of ``dataset``."""

    def __init__(
        self,
        dataset: Any,
        report: DataReport,
        lengths: "array[int]",
        store: ExampleStore,
        kept: Sequence[int],
    ) -> None:
        self.dataset = dataset
        self.report = report
        self.lengths = lengths
        self._store = store
        self._kept = kept

    def example(self, index: int) -> Example:
        """Return an example as it was read; they are counted in the files' order, without what was left out."""
        return self._store[self._kept[index]]

    def sample(self, count: int) -> list[Example]:
        """Return so many different examples, or all: those that content alone picks, whatever their order."""
        prints = self._store.fingerprints
        numbers = {prints[number]: number for number in reversed(self._kept)}
        return self._store.read([numbers[each] for each in heapq.nsmallest(count, numbers)])


def load_data(settings: DataSettings, tokenizer: FastTokenizer) -> TrainingData:
    """Read and tokenise the files.

    Raises InvalidData, with file and line, for the first row that can't be read or has nothing to train on, and for no
    data at all; InvalidArgument for a format that doesn't exist.
    """
    renderer = _renderer(settings, tokenizer)
    store, files = _read(settings)
    return _tokenise(_draw(files, settings.seed), store, files, renderer, settings)


def load_split(
    settings: DataSettings, tokenizer: FastTokenizer, eval_share: float
) -> tuple[TrainingData, TrainingData]:
    """Read the files and put ``eval_share`` of the examples aside, for evaluation.

    Returns train and eval; eval is never packed. Where an example goes depends on its content and the seed alone, so
    that equal examples are never on both sides.
    """
    if not 0 < eval_share < 1:
        raise InvalidArgument(f"the share for evaluation is {eval_share:g}; it has to be between 0 and 1")
    renderer = _renderer(settings, tokenizer)
    store, files = _read(settings)
    drawn = _draw(files, settings.seed)
    for_eval = _for_eval(store.fingerprints, set(drawn), eval_share, settings.seed)
    if len(for_eval) == len(set(drawn)):
        raise InvalidData("there are too few different examples to put some aside for evaluation")
    train = array("q", (index for index in drawn if index not in for_eval))
    return (
        _tokenise(train, store, files, renderer, settings, "train"),
        _tokenise(sorted(for_eval), store, files, renderer, replace(settings, packing=False), "eval"),
    )


def read_examples(
    path: str, format: DataFormat | None = None, columns: Columns | None = None
) -> Iterator[Example]:
    """Yield a file's examples, in order. Raises InvalidData for the first row that isn't one."""
    known = format or recognise(path, columns)
    for row in read_rows(path, columns):
        source = Source(path, row.line, row.number)
        if row.value is None:
            raise InvalidData(f"{source}: {row.error}; `manylora data check` lists all such rows")
        yield known.example(row.value, source)


@dataclass(frozen=True, slots=True)
class _File:
    path: DataPath
    format: DataFormat
    rows: range
    """Its examples' numbers in the store."""
    unread: Mapping[str, int]
    """In how many rows each field wasn't read."""

    @property
    def used(self) -> int:
        return max(1, round(self.path.share * len(self.rows)))


def _renderer(settings: DataSettings, tokenizer: FastTokenizer) -> Renderer:
    return Renderer(tokenizer, settings.max_length, system=settings.system, stop_ids=settings.stop_ids)


def _read(settings: DataSettings) -> tuple[ExampleStore, tuple[_File, ...]]:
    if not settings.paths:
        raise InvalidArgument("there is no data file to train on")
    chosen = format_named(settings.format) if settings.format else None
    files: list[_File] = []
    store = ExampleStore(Directory())

    def examples() -> Iterator[Example]:
        for path in map(parse_data_path, settings.paths):
            known = chosen or recognise(path.path, settings.columns)
            first = len(store)
            unread: Counter[str] = Counter()
            for example in read_examples(path.path, known, settings.columns):
                unread.update(example.unread)
                yield example
            rows = range(first, len(store))
            if not rows:
                raise InvalidData(f"{path.path}: there is no row in it")
            files.append(_File(path, known, rows, unread))

    store.fill(examples())
    return store, tuple(files)


def _draw(files: Sequence[_File], seed: int) -> "array[int]":
    """Return the examples' numbers that the files' shares ask for."""
    rng = random.Random(seed)
    drawn = array("q")
    for file in files:
        times, rest = divmod(file.used, len(file.rows))
        for _ in range(times):
            drawn.extend(file.rows)
        drawn.extend(sorted(rng.sample(file.rows, rest)))
    return drawn


def _for_eval(fingerprints: Sequence[int], candidates: set[int], share: float, seed: int) -> set[int]:
    """Choose by content: those whose fingerprints, mixed with the seed, are smallest."""
    salt = random.Random(seed).getrandbits(64)
    wanted = max(1, round(share * len(candidates)))
    ranked = sorted(candidates, key=lambda index: (fingerprints[index] ^ salt, index))
    border = fingerprints[ranked[wanted - 1]]
    while wanted < len(ranked) and fingerprints[ranked[wanted]] == border:
        wanted += 1
    return set(ranked[:wanted])


def _tokenise(
    drawn: Sequence[int],
    store: ExampleStore,
    files: Sequence[_File],
    renderer: Renderer,
    settings: DataSettings,
    name: str = "tokens",
) -> TrainingData:
    about = tuple(
        FileReport(file.path.path, file.format.name, len(file.rows), file.path.share, file.used, file.unread)
        for file in files
    )
    tally = _Tally()
    with tokens_writer(store.directory, name) as writer:
        for start in range(0, len(drawn), ROWS_PER_BATCH):
            numbers = drawn[start : start + ROWS_PER_BATCH]
            examples = store.read(numbers)
            for number, example, rendered in zip(
                numbers, examples, renderer.render_batch(examples), strict=True
            ):
                if isinstance(rendered, InvalidData):
                    raise rendered
                if tally.takes(rendered, example, number):
                    writer.write(rendered.input_ids, rendered.labels)
    if not tally.kept:
        raise InvalidData(
            f"no example has an answer left in its first {settings.max_length} tokens; raise --model_max_length"
        )
    return _finish(tally, about, store, renderer, settings, name)


class _Tally:
    """Counts while examples are tokenised."""

    def __init__(self) -> None:
        self.kept = array("q")
        self.lengths = array("i")
        self.trained_tokens = 0
        self.truncated, self.truncated_tokens = Finding(), 0
        self.dropped, self.without_stop, self.not_as_served = Finding(), Finding(), Finding()

    def takes(self, rendered: Rendered, example: Example, number: int) -> bool:
        """Count an example; False if it is to be left out."""
        if rendered.truncated:
            self.truncated.add(example.source)
            self.truncated_tokens += rendered.truncated
        trained = rendered.trained_tokens
        if not trained:
            self.dropped.add(example.source)
            return False
        if not rendered.stops and not rendered.truncated:
            self.without_stop.add(example.source)
        if not rendered.as_served:
            self.not_as_served.add(example.source)
        self.kept.append(number)
        self.lengths.append(len(rendered.input_ids))
        self.trained_tokens += trained
        return True


def _finish(
    tally: _Tally,
    files: tuple[FileReport, ...],
    store: ExampleStore,
    renderer: Renderer,
    settings: DataSettings,
    name: str,
) -> TrainingData:
    dataset = open_tokens(store.directory, name)
    lengths = tally.lengths
    rows: list[list[int]] = []
    if settings.packing:
        rows = pack(tally.lengths, settings.max_length)
        dataset = PackedItems(dataset, rows)
        lengths = array("i", (sum(tally.lengths[index] for index in row) for row in rows))
    report = DataReport(
        files=files,
        examples=len(tally.kept),
        max_length=settings.max_length,
        tokens=sum(tally.lengths),
        trained_tokens=tally.trained_tokens,
        truncated=tally.truncated,
        truncated_tokens=tally.truncated_tokens,
        dropped=tally.dropped,
        without_stop=tally.without_stop,
        not_as_served=tally.not_as_served,
        folds_system=renderer.folds_system and (store.has_system or settings.system is not None),
        lengths=percentiles(tally.lengths),
        packed_rows=len(rows),
    )
    return TrainingData(dataset, report, lengths, store, tally.kept)
