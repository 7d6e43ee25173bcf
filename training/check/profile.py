"""What is usual in a data set, learnt from a sample spread over it, so that rows are judged by their own kind."""

from collections.abc import Sequence
from dataclasses import dataclass

from manylora.training.check.endings import Endings
from manylora.training.check.loops import looping
from manylora.training.check.reading import DataFile, example_of, rows_of
from manylora.training.check.rows import flags_of
from manylora.training.check.shared import Shared
from manylora.training.check.shingles import Boilerplate
from manylora.training.check.texts import RowText, row_text, words_only

SAMPLE = 20_000
LANGUAGE_SAMPLE = 20_000


@dataclass(frozen=True, slots=True)
class Profile:
    """The size of a data set and its habits."""

    rows: int
    rows_per_file: tuple[int, ...]
    endings: Endings
    boilerplate: Boilerplate
    shared: Shared

    @property
    def language_stride(self) -> int:
        """The language of every n-th row is told: it takes longer than all else, and a mix needs no more."""
        return max(1, self.rows // LANGUAGE_SAMPLE)


def learn(files: Sequence[DataFile]) -> Profile:
    """Read all files once: count the rows and keep every n-th of them, n doubling as they grow."""
    sample: list[tuple[int, RowText]] = []
    counts = [0] * len(files)
    stride = 1
    for number, index, row in rows_of(files):
        counts[index] += 1
        if number % stride:
            continue
        example = example_of(row, files[index])
        if isinstance(example, str):
            continue
        if not flags_of(example):  # a habit is learnt from rows that are well otherwise
            sample.append((number, row_text(example)))
        if len(sample) > SAMPLE:
            stride *= 2
            sample = [kept for kept in sample if kept[0] % stride == 0]
    texts = [text for _, text in sample]
    loops = looping([text.answer for text in texts])
    return Profile(
        rows=sum(counts),
        rows_per_file=tuple(counts),
        endings=Endings.learn([text for text, loop in zip(texts, loops, strict=True) if not loop]),
        boilerplate=Boilerplate.learn([compared(text) for text in texts]),
        shared=Shared.learn(texts),
    )


def compared(text: RowText) -> str:
    """What of a row is compared in the search for near duplicates: the words of prompt and answer."""
    return words_only(f"{text.prompt} {text.answer}")[:LONGEST]


LONGEST = 16_000
"""Characters. Two rows that agree this far are near enough to be looked at."""
