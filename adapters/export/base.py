"""The base that is merged into, tensor by tensor: as its checkpoint has it, or as 4-bit serving sees it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch

from manylora.adapters.export.errors import ExportRefused
from manylora.adapters.export.outline import EMBEDDING, HEAD, ModelOutline
from manylora.adapters.export.rows import DenseRows, PackedRows, Rows
from manylora.quant.checkpoint import Checkpoint
from manylora.quant.config import stored_format
from manylora.quant.dense import DenseTensor
from manylora.quant.format import read_dense
from manylora.quant.nf4 import quantize_nf4

DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


class BaseWeights(Protocol):
    """A model's weights by the names of its parameters. The tensor read last is kept for whoever asks next."""

    def rows(self, name: str) -> Rows:
        """Return a parameter."""
        ...


class BaseCheckpoint:
    """A checkpoint directory: dense, NF4, GPTQ or AWQ; quantised matrices are seen dequantised.

    Raises ExportRefused without a readable config.json, manylora.quant.errors.QuantError for what else is wrong.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = read_config(directory)
        self.stored = stored_format(directory, self.config)
        self._checkpoint = Checkpoint(directory)
        self._last: tuple[str, Rows] | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about files that look like its weights and were not read."""
        return self._checkpoint.notes

    @property
    def is_dense(self) -> bool:
        """Whether its linear layers are 16- or 32-bit."""
        return self.stored.kind == "dense"

    def has(self, name: str) -> bool:
        """Whether it holds a parameter, dense or packed."""
        return name in self._checkpoint.names() or self._is_packed(name)

    def dtype(self) -> torch.dtype:
        """Return the type that its config says, else that of its norms."""
        said = self.config.get("dtype") or self.config.get("torch_dtype")
        found = DTYPES.get(str(said))
        return self._checkpoint.read("model.norm.weight").dtype if found is None else found

    def rows(self, name: str) -> Rows:
        """Return a parameter; where the head is tied, either name may hold it."""
        if self._last is None or self._last[0] != name:
            self._last = None  # let go before the next is read
            self._last = (name, self._read(name))
        return self._last[1]

    def has_own_head(self, outline: ModelOutline) -> bool:
        """Whether the head is a matrix of its own, told by the config or, where both are stored, by their values."""
        if not outline.tied:
            return True
        names = self._checkpoint.names()
        if EMBEDDING not in names or HEAD not in names:
            return False
        return not torch.equal(self._checkpoint.read(EMBEDDING), self._checkpoint.read(HEAD))

    def check_complete(self, outline: ModelOutline) -> None:
        """Raise ExportRefused naming a parameter of the model that isn't there."""
        either = {EMBEDDING, HEAD} if outline.tied else set()
        for name in outline.shapes.keys() - either:
            if not self.has(name):
                raise ExportRefused(f"{self.directory}: the model has a parameter {name!r}, the files do not")
        if either and not any(self.has(name) for name in either):
            raise ExportRefused(f"{self.directory}: the embedding is missing")

    def _is_packed(self, name: str) -> bool:
        return name.endswith(".weight") and self.stored.packs(self._checkpoint, name.removesuffix(".weight"))

    def _read(self, name: str) -> Rows:
        if name in (EMBEDDING, HEAD) and not self.has(name):
            name = HEAD if name == EMBEDDING else EMBEDDING
        if not self._is_packed(name):
            return DenseRows(read_dense(self._checkpoint, name))
        matrix, _ = self.stored.read(self._checkpoint, name.removesuffix(".weight"))
        return DenseRows(matrix.weight) if isinstance(matrix, DenseTensor) else PackedRows(matrix)


class ServedAsNf4:
    """A 16-bit base as the server holds it: linear layers rounded to NF4, everything else rounded to its dtype."""

    def __init__(
        self, base: BaseCheckpoint, linears: frozenset[str], dtype: torch.dtype, *, double_quant: bool
    ) -> None:
        self._base = base
        self._linears = linears
        self._dtype = dtype
        self._double_quant = double_quant
        self._last: tuple[str, Rows] | None = None

    def rows(self, name: str) -> Rows:
        """Return a parameter, dequantised if it is a linear layer's."""
        if name not in self._linears:
            return self._base.rows(name)
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = (name, self._quantize(name))
        return self._last[1]

    def _quantize(self, name: str) -> Rows:
        dense = self._base.rows(name)
        assert isinstance(dense, DenseRows)
        try:
            matrix = quantize_nf4(dense.weight.to(self._dtype), double_quant=self._double_quant)
        except ValueError as error:
            raise ExportRefused(f"{self._base.directory}: {name}: {error}") from None
        return PackedRows(matrix)


def read_config(directory: Path) -> Mapping[str, object]:
    """Return a model directory's config.json. Raises ExportRefused."""
    path = directory / "config.json"
    try:
        config: object = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ExportRefused(
            f"{path} can't be read ({getattr(error, 'strerror', error)}); a base is a directory with one"
        ) from None
    if not isinstance(config, dict):
        raise ExportRefused(f"{path} is not a JSON object")
    return config
