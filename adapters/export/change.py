"""What a trained adapter changes in its base, parameter by parameter: LoRA, rsLoRA, DoRA, and whole tensors.

Whole tensors are modules_to_save and trained biases; of modules_to_save more is merged than is served, norms too.
What can't be merged exactly is refused, naming the field or the tensor. Tensors are read when they are asked for.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from manylora.adapters.conversion import widened
from manylora.adapters.errors import InvalidAdapter, UnsupportedAdapter
from manylora.adapters.export.matrix_change import Change, FactorChange
from manylora.adapters.export.outline import EMBEDDING, HEAD, ModelOutline
from manylora.adapters.files import WEIGHTS_FILE, digest_of, present_files, read_json_object
from manylora.adapters.header import TensorEntry, read_header
from manylora.adapters.reader import MAX_ADAPTER_BYTES
from manylora.adapters.spec import ALL_LINEAR, CONFIG_FILE, AdapterSpec
from manylora.adapters.token_fields import TRAINED

PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_TOKEN_A, _TOKEN_B = ".lora_embedding_A", ".lora_embedding_B"
MAGNITUDE = re.compile(r"\.lora_magnitude_vector(\.weight)?$")
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save)\.")
_UNTRAINED = ".original_module."
"""What modules_to_save started from; peft saves it too when a vocabulary grew."""
_WHOLE = ("modules_to_save", "bias")
"""Fields that are not asked of the spec, which refuses what isn't served: what they name is merged as it is saved."""
_TIE = "ensure_weight_tying"


@dataclass(frozen=True, slots=True)
class Factors:
    """A pair as it was trained: what it adds is scale · b a."""

    a: Tensor
    """float32 [rank, in]"""
    b: Tensor
    """float32 [out, rank]"""
    scale: float
    """α/r or α/√r"""


class Changes(Protocol):
    """What a merge adds to its base: one adapter, or several as one."""

    @property
    def keeps_tied(self) -> bool:
        """Whether embedding and head stay one matrix although it changes one of them."""
        ...

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the parameters that it adds factors to."""
        ...

    @property
    def replaced(self) -> tuple[str, ...]:
        """Names of the parameters that it brings whole."""
        ...

    @property
    def method(self) -> str:
        """What it is, in words."""
        ...

    def describe(self) -> dict[str, object]:
        """Return what a manifest says of it."""
        ...

    def touches(self, name: str) -> bool:
        """Whether it changes a parameter at all."""
        ...

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a parameter that it brings whole."""
        ...

    def whole(self, name: str) -> Tensor | None:
        """Return the tensor that replaces a parameter, if there is one."""
        ...

    def change(self, name: str) -> Change | None:
        """Return what is added to a parameter, if anything."""
        ...


class TrainedAdapter:
    """A PEFT adapter's directory, held against the base that ``outline`` describes.

    Raises AdapterNotFound, UnsupportedAdapter or InvalidAdapter.
    """

    def __init__(self, directory: Path, outline: ModelOutline) -> None:
        present_files(directory, MAX_ADAPTER_BYTES)
        config = read_json_object(directory / CONFIG_FILE)
        self.directory = directory
        self.keeps_tied = bool(config.get(_TIE))
        self.spec = AdapterSpec.parse({k: v for k, v in config.items() if k not in _WHOLE})
        if self.spec.trained_tokens:
            raise UnsupportedAdapter(
                f"{TRAINED} is set: rows of single tokens are served, and not merged yet", file=CONFIG_FILE
            )
        if self.spec.lora_bias:
            raise UnsupportedAdapter(
                "lora_bias is set: biases of B are served, and not merged yet", file=CONFIG_FILE
            )
        self.digest = digest_of(directory, MAX_ADAPTER_BYTES)
        self._entries = read_header(directory / WEIGHTS_FILE)
        self._factors, self._whole = _sort_out(self._entries, outline)
        self._magnitudes = {
            name: tensor
            for tensor in self._entries
            if MAGNITUDE.search(tensor)
            for name in [_parameter(MAGNITUDE.sub("", tensor))]
        }
        self._check(outline)

    @property
    def changed(self) -> tuple[str, ...]:
        """Names of the parameters that it adds factors to."""
        return tuple(self._factors)

    @property
    def replaced(self) -> tuple[str, ...]:
        """Names of the parameters that it brings whole."""
        return tuple(self._whole)

    @property
    def method(self) -> str:
        """What it is, in words."""
        kind = "rsLoRA" if self.spec.use_rslora else "LoRA"
        return f"{'DoRA, ' if self.spec.use_dora else ''}{kind} of rank {self.spec.rank}"

    def describe(self) -> dict[str, object]:
        """Return what a manifest says of it."""
        return {
            "digest": self.digest,
            "method": self.method,
            "rank": self.spec.rank,
            "alpha": self.spec.alpha,
            "target_modules": list(self.spec.named_targets()),
        }

    def touches(self, name: str) -> bool:
        """Whether it changes a parameter at all."""
        return name in self._factors or name in self._whole

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a parameter that it brings whole."""
        tensor = self._whole.get(name)
        return None if tensor is None else self._entries[tensor].shape

    def whole(self, name: str) -> Tensor | None:
        """Return the tensor that replaces a parameter, if there is one."""
        tensor = self._whole.get(name)
        return None if tensor is None else self._read(tensor)

    def factors(self, name: str) -> Factors | None:
        """Return the pair that is added to a parameter, if any. Raises InvalidAdapter for NaN or Inf."""
        pair = self._factors.get(name)
        if pair is None:
            return None
        first, second = (self._read(tensor).float() for tensor in pair)
        scale = self.spec.scale_of(name.removesuffix(".weight"))
        if pair[0].endswith(_TOKEN_A):
            # An embedding's factors are those of its transpose: [rank, vocabulary] and [features, rank].
            return Factors(second.T.contiguous(), first.T, scale)
        return Factors(first, second, scale)

    def change(self, name: str) -> Change | None:
        """Return what is added to a parameter, if anything. Raises InvalidAdapter for NaN or Inf."""
        found = self.factors(name)
        if found is None:
            return None
        magnitude = None if self._factors[name][0].endswith(_TOKEN_A) else self._magnitudes.get(name)
        return FactorChange(
            found.a,
            found.b * found.scale,
            None if magnitude is None else self._read(magnitude).float().view(-1),
        )

    def _read(self, tensor: str) -> Tensor:
        try:
            with safe_open(self.directory / WEIGHTS_FILE, framework="pt") as file:
                found = widened(file.get_tensor(self._entries[tensor].name).clone())
        except SafetensorError as error:
            raise InvalidAdapter(f"can't be read: {error}", file=WEIGHTS_FILE, tensor=tensor) from error
        if not bool(torch.isfinite(found).all()):
            raise InvalidAdapter("holds NaN or Inf", file=WEIGHTS_FILE, tensor=tensor)
        return found

    def _check(self, outline: ModelOutline) -> None:
        for name, pair in self._factors.items():
            self._check_factors(name, pair, outline.shapes[name])
        for name, tensor in self._whole.items():
            found, wanted = self._entries[tensor].shape, outline.shapes[name]
            resized = name in (EMBEDDING, HEAD) and found[1:] == wanted[1:]
            if found != wanted and not resized:
                raise _misfit(tensor, found, wanted)
        self._check_complete(outline)

    def _check_factors(self, name: str, pair: tuple[str, str], shape: tuple[int, ...]) -> None:
        path = name.removesuffix(".weight")
        rank = self.spec.rank_of(path)
        out, wide = shape
        wanted = {pair[0]: (rank, wide), pair[1]: (out, rank)}
        if pair[0].endswith(_TOKEN_A):
            wanted = {pair[0]: (rank, out), pair[1]: (wide, rank)}
        for tensor, sizes in wanted.items():
            if self._entries[tensor].shape != sizes:
                raise _misfit(tensor, self._entries[tensor].shape, sizes)
        if self.spec.use_dora != (name in self._magnitudes):
            raise InvalidAdapter(
                f"use_dora is {str(self.spec.use_dora).lower()}, which its magnitude vector contradicts",
                file=WEIGHTS_FILE,
                tensor=path,
            )

    def _check_complete(self, outline: ModelOutline) -> None:
        """Refuse an adapter of which a part is missing, or one that changes nothing."""
        candidates = outline.linears
        if str(self.spec.target_modules).lower() != ALL_LINEAR:
            candidates = candidates | {EMBEDDING, HEAD}
        for name in candidates & outline.shapes.keys():
            if self.spec.targets(name.removesuffix(".weight")) and name not in self._factors:
                if name == HEAD and self.keeps_tied:
                    continue
                raise InvalidAdapter(
                    "the config targets it, but its factors are missing",
                    file=WEIGHTS_FILE,
                    tensor=name.removesuffix(".weight"),
                )
        if not self._factors and not self._whole:
            raise InvalidAdapter("no tensor belongs to a module of this base", file=WEIGHTS_FILE)


def _sort_out(
    entries: Mapping[str, TensorEntry], outline: ModelOutline
) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """Return pairs of factors, and whole tensors, by the parameter that they change."""
    factors: dict[str, tuple[str, str]] = {}
    whole: dict[str, str] = {}
    for tensor in sorted(entries):
        for first, second in ((_A, _B), (_TOKEN_A, _TOKEN_B)):
            if tensor.endswith(first):
                other = tensor.removesuffix(first) + second
                if other not in entries:
                    raise InvalidAdapter("its other half is missing", file=WEIGHTS_FILE, tensor=tensor)
                factors[_parameter(tensor.removesuffix(first))] = tensor, other
        if ".lora_" not in tensor and _UNTRAINED not in tensor:
            # The name without a wrapper sorts last: of two copies it is the one taken.
            whole[_WRAPPERS.sub(".", tensor.removeprefix(PREFIX))] = tensor
    for name, owner in {**{name: pair[0] for name, pair in factors.items()}, **whole}.items():
        if name not in outline.shapes:
            raise UnsupportedAdapter("belongs to no parameter of this base", file=WEIGHTS_FILE, tensor=owner)
    known = {tensor for pair in factors.values() for tensor in pair}
    for tensor in sorted(entries.keys() - known):
        if ".lora_" in tensor and not MAGNITUDE.search(tensor):
            raise UnsupportedAdapter("is of a kind that can't be merged", file=WEIGHTS_FILE, tensor=tensor)
    return factors, whole


def _parameter(path: str) -> str:
    return f"{path.removeprefix(PREFIX)}.weight"


def _misfit(tensor: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> InvalidAdapter:
    return InvalidAdapter(
        f"has shape {list(found)}; this base and the config need {list(wanted)}",
        file=WEIGHTS_FILE,
        tensor=tensor,
    )
