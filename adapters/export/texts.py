"""Whether the parts of a mixture agree on their texts: the template and tokenizer each is asked with, how it pools.

A part without its own goes by the base's, so a part with a template and one without differ unless the template is the
base's. How texts are pooled is what those parts say that say it, as where the mixture is served.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manylora.adapters.errors import InvalidMixture
from manylora.adapters.export.settings import ExportPart
from manylora.adapters.files import POOLING_FILE, TOKENIZER_JSON
from manylora.adapters.pooling import Way
from manylora.adapters.tokenizer import TokenizerRefused, load_tokenizer
from manylora.adapters.tokens import AdapterText, read_text

_NOT_THE_TOKENIZER_S = ("truncation", "padding")
"""What was last asked of a tokenizer, saved along."""


@dataclass(frozen=True, slots=True)
class _Texts:
    template: str | None
    tokenizer: Path | None
    """A directory with a tokenizer.json."""
    names: dict[str, str | None]
    """Special tokens."""
    pooling: Way | None


def check_texts(parts: Sequence[ExportPart], base: Path | None) -> None:
    """Raise InvalidMixture for the first two parts that have different templates, tokenizers or ways of pooling.

    Without a base, its texts differ from anybody's own.
    """
    ground = _Texts(None, None, {}, None) if base is None else _own(base)
    texts = [_over(ground, _own(part.directory)) for part in parts]
    for part, found in zip(parts[1:], texts[1:], strict=True):
        what = _difference(texts[0], found)
        if what is not None:
            raise InvalidMixture(
                f"{parts[0].name!r} and {part.name!r} have different {what}: a mixture is asked with one"
                + ("" if base is not None else "; if one of them is the base's, name it with --base")
            )
    _check_poolings(parts, texts)


def _check_poolings(parts: Sequence[ExportPart], texts: Sequence[_Texts]) -> None:
    told = [(part.name, text.pooling) for part, text in zip(parts, texts, strict=True) if text.pooling]
    for name, way in told[1:]:
        if way != told[0][1]:
            raise InvalidMixture(
                f"{told[0][0]!r} and {name!r} pool texts in different ways, {told[0][1]} and {way}: one adapter or"
                f" model says one, so give both the same {POOLING_FILE}, or take it out of one"
            )


def _own(directory: Path) -> _Texts:
    text: AdapterText = read_text(directory, None)
    tokenizer = directory if text.has_tokenizer else None
    return _Texts(text.chat_template, tokenizer, dict(text.special_tokens), text.pooling)


def _over(base: _Texts, own: _Texts) -> _Texts:
    template = base.template if own.template is None else own.template
    return _Texts(template, own.tokenizer or base.tokenizer, {**base.names, **own.names}, own.pooling)


def _difference(one: _Texts, other: _Texts) -> str | None:
    if one.template != other.template:
        return "chat templates"
    if one.names != other.names:
        names = sorted(
            name for name in one.names | other.names if one.names.get(name) != other.names.get(name)
        )
        return f"special tokens ({names[0]})" if names else "special tokens"
    if not _same_tokenizer(one.tokenizer, other.tokenizer):
        return "tokenizers"
    return None


def _same_tokenizer(one: Path | None, other: Path | None) -> bool:
    if one is None or other is None or one == other:
        return one == other
    if _digest(one) == _digest(other):
        return True
    try:
        found: bool = _content(one) == _content(other)
    except (TokenizerRefused, ValueError):
        return False
    return found


def _digest(directory: Path) -> bytes:
    with (directory / TOKENIZER_JSON).open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _content(directory: Path) -> Any:  # JSON
    """Return a tokenizer as the library writes it: files that were saved by different versions are alike."""
    found = json.loads(load_tokenizer(directory).backend_tokenizer.to_str())
    return {key: value for key, value in found.items() if key not in _NOT_THE_TOKENIZER_S}
