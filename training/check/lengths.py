"""How long rows are, in tokens: by a tokenizer, or by an estimate that needs none."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from manylora.adapters import tokenizer
from manylora.adapters.tokenizer import TokenizerRefused
from manylora.training.check.shingles import code_points
from manylora.training.errors import BaseRefused

CHARACTERS_PER_TOKEN = 4.0
"""Of writing in letters, for today's vocabularies; ideographs, kana and Hangul are counted as a token each."""


class Tokenizer(Protocol):
    """What is asked of a tokenizer: transformers' own fit."""

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Mapping[str, Sequence[Sequence[int]]]:
        """Return ``input_ids`` for each text."""


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Load a base's tokenizer. Raises BaseRefused where there is none."""
    if not Path(directory).is_dir():
        raise BaseRefused(f"{directory}: is no directory; --base is a checkpoint's, for its tokenizer")
    try:
        return cast(Tokenizer, tokenizer.load_tokenizer(directory))
    except TokenizerRefused as error:
        raise BaseRefused(str(error)) from None


def token_counts(texts: Sequence[str], tokenizer: Tokenizer | None) -> NDArray[np.int64]:
    """Count each text's tokens, [texts]; without a tokenizer, estimate them."""
    if tokenizer is None:
        return _estimated(texts)
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return np.fromiter((len(one) for one in ids), dtype=np.int64, count=len(texts))


def _estimated(texts: Sequence[str]) -> NDArray[np.int64]:
    characters, starts = code_points(texts)
    wide = np.concatenate(([0], np.cumsum((characters >= 0x2E80) & (characters < 0x1F000))))
    ideographs = wide[starts[1:]] - wide[starts[:-1]]
    others = np.diff(starts) - ideographs
    return cast("NDArray[np.int64]", ideographs + np.ceil(others / CHARACTERS_PER_TOKEN).astype(np.int64))


def quartile_fence(lengths: NDArray[Any]) -> float:
    """The length above which a row is unusual: three times the quartiles' distance above the upper, on a log scale."""
    if len(lengths) < 20:
        return float("inf")
    low, high = np.percentile(np.log(np.maximum(lengths, 1)), [25, 75])
    return max(float(np.exp(high + 3 * (high - low))), 1000.0)
