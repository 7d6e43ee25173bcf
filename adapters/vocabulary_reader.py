"""Reads what an adapter changes of embedding and head into serving layout: finite, and without what is the base's."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from manylora.adapters.conversion import widened
from manylora.adapters.errors import InvalidAdapter
from manylora.adapters.files import WEIGHTS_FILE
from manylora.adapters.header import TensorEntry
from manylora.adapters.spec import AdapterSpec
from manylora.adapters.vocabulary import (
    EMBEDDING,
    HEAD,
    TOKEN_MODULES,
    BaseVocabulary,
    TokenDelta,
    TokenFactors,
    TokenRows,
    VocabularyDelta,
)
from manylora.adapters.vocabulary_outline import ModuleOutline, VocabularyOutline

CHUNK = 4096
"""Rows that are looked at at once."""


def read_vocabulary(
    file: Any, outline: VocabularyOutline, spec: AdapterSpec, base: BaseVocabulary, dtype: torch.dtype
) -> VocabularyDelta | None:
    """Return it in ``dtype``; None: all that is saved is the base's own.

    ``file`` is the open safetensors file. A whole module keeps the rows alone that differ from the base's in ``dtype``,
    unless those are most. Raises InvalidAdapter for what isn't finite, or overflows ``dtype``.
    """
    rows: dict[str, TokenRows | None] = {}
    for path in TOKEN_MODULES:
        module, other = outline.modules[path], outline.modules[EMBEDDING]
        if path == HEAD and base.tied and (module.table, module.rows) == (other.table, other.rows):
            rows[path] = rows[EMBEDDING]
        else:
            rows[path] = _rows(file, module, base.show(path) if module.table is not None else None, dtype)
    found: dict[str, TokenDelta] = {}
    for path, module in outline.modules.items():
        found[path] = TokenDelta(rows[path], _factors(file, module, spec.scale_of(path), dtype))
    if outline.size == base.size and not any(found.values()):
        return None
    return VocabularyDelta(outline.size, found[EMBEDDING], found[HEAD])


def _rows(file: Any, module: ModuleOutline, known: Tensor | None, dtype: torch.dtype) -> TokenRows | None:
    """Return a module's own rows; ``known`` are the base's."""
    found = None if module.table is None else _differing(file, module.table, known, dtype)
    if module.rows is None:
        return found
    order = torch.tensor(module.trained).argsort()
    ids = torch.tensor(module.trained)[order]
    trained = _sound(file.get_tensor(module.rows.name), module.rows, dtype)[order]
    if found is None:
        return TokenRows(trained.contiguous(), ids)
    if found.ids is None:
        found.rows[ids] = trained
        return found
    kept = ~torch.isin(found.ids, ids)
    every = torch.cat((found.ids[kept], ids))
    by_id = every.argsort()
    return TokenRows(torch.cat((found.rows[kept], trained))[by_id].contiguous(), every[by_id])


def _differing(file: Any, entry: TensorEntry, known: Tensor | None, dtype: torch.dtype) -> TokenRows | None:
    """Return the rows of a whole module that aren't the base's."""
    differ = torch.zeros(entry.shape[0], dtype=torch.bool)
    for first, part in _chunks(file, entry, dtype):
        differ[first : first + len(part)] = True
        if known is not None:
            theirs = known[first : first + len(part)].to(dtype)
            differ[first : first + len(theirs)] = (part[: len(theirs)] != theirs).any(1)
    ids = differ.nonzero().flatten()
    if not len(ids):
        return None
    whole = 2 * len(ids) > entry.shape[0]
    rows = torch.empty(entry.shape[0] if whole else len(ids), entry.shape[1], dtype=dtype)
    filled = 0
    for first, part in _chunks(file, entry, dtype):
        own = part if whole else part[differ[first : first + len(part)]]
        rows[filled : filled + len(own)] = own
        filled += len(own)
    return TokenRows(rows, None if whole else ids)


def _chunks(file: Any, entry: TensorEntry, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Yield the number of the first row, and the rows, of one piece of a matrix after the other."""
    matrix = file.get_slice(entry.name)
    for first in range(0, entry.shape[0], CHUNK):
        yield first, _sound(matrix[first : first + CHUNK], entry, dtype)


def _factors(file: Any, module: ModuleOutline, scale: float, dtype: torch.dtype) -> TokenFactors | None:
    if not module.factors:
        return None
    a, b = module.factors
    scaled = _sound(file.get_tensor(b.name), b, torch.float32).T * scale
    return TokenFactors(
        _sound(file.get_tensor(a.name), a, dtype).contiguous(), _sound(scaled, b, dtype).contiguous()
    )


def _sound(values: Tensor, entry: TensorEntry, dtype: torch.dtype) -> Tensor:
    """Return values in ``dtype``, in memory of their own."""
    values = widened(values)
    if not bool(torch.isfinite(values).all()):
        raise InvalidAdapter("holds NaN or Inf", file=WEIGHTS_FILE, tensor=entry.name)
    cast = torch.empty(values.shape, dtype=dtype).copy_(values)
    if not bool(torch.isfinite(cast).all()):
        raise InvalidAdapter(f"overflows {dtype}", file=WEIGHTS_FILE, tensor=entry.name)
    return cast
