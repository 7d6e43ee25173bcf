"""Which language rows are in, by py3langid, where there is enough text to tell."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

UNKNOWN = 0
"""The code of rows that are too short, or in no language: code, tables, numbers."""
NOT_LOOKED_AT = 255
LONGEST = 200
SHORTEST_LATIN, SHORTEST_OTHER = 40, 10
SURE = 0.9
_LETTERS = re.compile(r"[^\W\d_]")


class _Identifier(Protocol):
    def classify(self, text: str) -> tuple[str, float]: ...


@cache
def _identifier() -> tuple[_Identifier, dict[str, int]]:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    names = sorted(str(name) for name in identifier.labels)
    return cast(_Identifier, identifier), {name: code for code, name in enumerate(names, 1)}


def language_codes(texts: Sequence[str]) -> NDArray[np.uint8]:
    """Return each text's language as a number, [texts]; 0 where it can't be told."""
    identifier, codes = _identifier()
    found = np.zeros(len(texts), dtype=np.uint8)
    for index, text in enumerate(texts):
        part = text[:LONGEST]
        letters = len(_LETTERS.findall(part))
        if letters < (SHORTEST_LATIN if part.isascii() else SHORTEST_OTHER):
            continue
        language, probability = identifier.classify(part)
        if probability >= SURE:
            found[index] = codes[language]
    return found


def language_name(code: int) -> str:
    """The ISO 639-1 name of a code, or "?"."""
    names = {number: name for name, number in _identifier()[1].items()}
    return names.get(code, "?")
