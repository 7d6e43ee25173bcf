"""From a directory in PEFT's format to weights in serving layout: whole, checked and finite, or not at all.

``inspect_adapter`` checks all that needs no tensor data; ``read_adapter`` does that and reads. The chat
template and added tokens are adapters/tokens.py's. Nothing here knows names, versions or where the files
are kept.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from manylora.adapters.base_form import BaseForm, read_base_form
from manylora.adapters.conversion import (
    B_BIAS,
    BIAS,
    MAGNITUDE,
    OTHER_BIAS,
    A,
    B,
    TrainedBias,
    TrainedModule,
    tensor_name,
    widened,
)
from manylora.adapters.errors import AdapterNotFound, InvalidAdapter, UnsupportedAdapter
from manylora.adapters.expected import (
    PART,
    check_complete,
    check_shapes,
    expected_ranks,
    expected_tensors,
    parts_of,
)
from manylora.adapters.files import WEIGHTS_FILE, digest_of, present_files, read_json_object
from manylora.adapters.header import TensorEntry, header_limit, read_header
from manylora.adapters.invocation import check_invocation, refuse_vocabulary
from manylora.adapters.spec import CONFIG_FILE, AdapterSpec
from manylora.adapters.tokens import AdapterText, read_text
from manylora.adapters.types import (
    AdapterWeights,
    BaseModules,
    LoraPair,
    ServedBase,
    rows_by_module,
)
from manylora.adapters.vocabulary import VOCABULARY, BaseVocabulary, VocabularyDelta
from manylora.adapters.vocabulary_outline import (
    TOKEN_TENSORS,
    VocabularyOutline,
    outline_vocabulary,
    split_tokens,
)
from manylora.adapters.vocabulary_reader import read_vocabulary

MAX_ADAPTER_BYTES = 8 << 30
"""Limit of all files of an adapter when the caller names no other."""
_INSIDE = "model."
Between = Callable[[], None]
"""Is called between an adapter's modules, and may wait."""


def go_on() -> None:
    """Read one module after the other."""


@dataclass(frozen=True, slots=True)
class AdapterOutline:
    """An adapter whose config, header and shapes fit the base; no tensor was read."""

    spec: AdapterSpec
    rank_by_path: Mapping[str, int]
    """Rank of each adapted module, by full path."""
    shifted: frozenset[str]
    """Modules that it brings a bias for, or a bias of B."""
    text: AdapterText
    tensor_names: Mapping[str, str]
    """What the file calls the factors, by the names that peft's save_pretrained gives them."""
    trained_on: BaseForm | None = None
    """How its base was held in training, if it says so."""
    vocabulary: VocabularyOutline | None = None
    """What it changes of embedding and head; None: nothing."""
    itemsize: int = 4
    """Bytes of a number as it is served."""

    def rank_by_module(self) -> dict[str, int]:
        """Return what AdapterWeights does, the units of embedding and head as many as they may be at most."""
        scaled = self.rank_by_path if self.spec.use_dora else ()
        rows = rows_by_module(self.rank_by_path, scaled, self.shifted)
        return rows if self.vocabulary is None else {**rows, VOCABULARY: self.vocabulary.units(self.itemsize)}


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter read whole."""

    spec: AdapterSpec
    weights: AdapterWeights
    digest: str
    """sha256 of the files' contents, 64 hex digits."""
    text: AdapterText
    """What the adapter brings for texts."""
    trained_on: BaseForm | None = None
    """How its base was held in training, if it says so."""

    @property
    def chat_template(self) -> str | None:
        """The template that the adapter brings, if it does."""
        return self.text.chat_template


def read_adapter(
    directory: Path,
    modules: BaseModules,
    *,
    max_rank: int,
    dtype: torch.dtype,
    vocab_size: int | None = None,
    vocabulary: BaseVocabulary | None = None,
    digest: str | None = None,
    base: ServedBase | None = None,
    between: Between = go_on,
) -> LoadedAdapter:
    """Read and check the adapter in ``directory``; factors come in ``dtype``, the scale folded into b.

    ``digest`` saves hashing when it is known; without ``base`` DoRA and biases are refused, and without the base's
    ``vocabulary`` adapters that change embedding or head. Raises AdapterNotFound, UnsupportedAdapter or InvalidAdapter;
    the last names the file and the tensors. Takes memory for what is read, and one more pair while converting.
    """
    outline = inspect_adapter(
        directory, modules, max_rank=max_rank, vocab_size=vocab_size, vocabulary=vocabulary
    )
    if base is None and (outline.spec.use_dora or outline.shifted):
        raise UnsupportedAdapter(
            "lengths (use_dora) and biases are relative to the base's, which isn't at hand", file=CONFIG_FILE
        )
    known = digest or digest_of(directory, MAX_ADAPTER_BYTES)
    weights = _weights(directory, outline, dtype, base, between)
    if outline.vocabulary is not None and vocabulary is not None:
        weights = replace(weights, vocabulary=_vocabulary(directory, outline, vocabulary, dtype))
    return LoadedAdapter(outline.spec, weights, known, outline.text, outline.trained_on)


def _vocabulary(
    directory: Path, outline: AdapterOutline, base: BaseVocabulary, dtype: torch.dtype
) -> VocabularyDelta | None:
    assert outline.vocabulary is not None
    try:
        with safe_open(directory / WEIGHTS_FILE, framework="pt") as file:
            return read_vocabulary(file, outline.vocabulary, outline.spec, base, dtype)
    except SafetensorError as error:
        raise InvalidAdapter(f"can't be read: {error}", file=WEIGHTS_FILE) from error


def _weights(
    directory: Path,
    outline: AdapterOutline,
    dtype: torch.dtype,
    base: ServedBase | None,
    between: Between,
) -> AdapterWeights:
    pairs: dict[str, LoraPair] = {}
    gains: dict[str, Tensor] = {}
    offsets: dict[str, Tensor] = {}
    for path, factors, biases in _modules(directory, outline):
        row_scale = None if base is None or factors is None else factors.row_scale(base)
        if factors is not None:
            pairs[path] = factors.pair(dtype, row_scale)
            if row_scale is not None:
                gains[path] = factors.gain(dtype, row_scale)
        offset = None if base is None else biases.offset(dtype, base)
        if offset is not None:
            offsets[path] = offset
        between()
    return AdapterWeights(pairs, gains, offsets, outline.spec.invocation)


def _modules(
    directory: Path, outline: AdapterOutline
) -> Iterator[tuple[str, TrainedModule | None, TrainedBias]]:
    """Yield what the file has of each module, one after the other."""
    names, spec = outline.tensor_names, outline.spec
    try:
        with safe_open(directory / WEIGHTS_FILE, framework="pt") as file:

            def found(path: str, part: str) -> Tensor | None:
                name = names.get(tensor_name(path, part))
                return None if name is None else widened(file.get_tensor(name))

            for path in [*outline.rank_by_path, *sorted(outline.shifted - outline.rank_by_path.keys())]:
                a, b, magnitude = (found(path, part) for part in (A, B, MAGNITUDE))
                scale = 1.0 if path not in outline.rank_by_path else spec.scale_of(path)
                whole = found(path, BIAS if path in outline.rank_by_path else OTHER_BIAS)
                module = None if a is None or b is None else TrainedModule(path, a, b, scale, magnitude)
                yield path, module, TrainedBias(path, found(path, B_BIAS), whole, scale)
    except SafetensorError as error:
        raise InvalidAdapter(f"can't be read: {error}", file=WEIGHTS_FILE) from error


def inspect_adapter(
    directory: Path,
    modules: BaseModules,
    *,
    max_rank: int,
    vocab_size: int | None = None,
    vocabulary: BaseVocabulary | None = None,
    dtype: torch.dtype = torch.float32,
) -> AdapterOutline:
    """Check everything but the tensors' values, in about a millisecond; ``dtype`` is what they would be served in.

    Raises what read_adapter raises.
    """
    if not directory.is_dir():
        raise AdapterNotFound("the adapter's directory is not there")
    present_files(directory, MAX_ADAPTER_BYTES)
    spec = AdapterSpec.parse(read_json_object(directory / CONFIG_FILE))
    trained_on = read_base_form(directory)
    most = (tensor_name(path, part) for path in modules for part in parts_of(spec))
    limit = header_limit(chain(most, () if vocabulary is None else TOKEN_TENSORS))
    header = read_header(directory / WEIGHTS_FILE, limit)
    with _told_the_base(spec):
        of_tokens, others = split_tokens(header)
        tokens = outline_vocabulary(spec, of_tokens, vocabulary, max_rank)
        if tokens is not None:
            refuse_vocabulary(spec.invocation)
        entries = _of_whole_model(others, modules)
        ranks = expected_ranks(spec, modules, max_rank, beside=tokens is not None)
        expected = expected_tensors(spec, modules, ranks)
        check_complete(entries, expected)
        check_shapes(entries, expected, ranks)
    own_size = None if tokens is None or tokens.size == vocab_size else tokens.size
    text = read_text(directory, vocab_size, own_size)
    check_invocation(spec.invocation, vocab_size)
    names = {name: entry.name for name, entry in entries.items()}
    shifted = frozenset(
        path
        for path in modules
        if any(tensor_name(path, part) in names for part in (B_BIAS, BIAS, OTHER_BIAS))
    )
    return AdapterOutline(spec, ranks, shifted, text, names, trained_on, tokens, dtype.itemsize)


def _of_whole_model(entries: Mapping[str, TensorEntry], modules: BaseModules) -> Mapping[str, TensorEntry]:
    """Return the tensors by the names that they have in a model with its head.

    An adapter that was trained without one (AutoModel, as sentence-transformers does) names modules from inside.
    """
    inside = {path.removeprefix(_INSIDE) for path in modules if path.startswith(_INSIDE)}
    found = [PART.fullmatch(name) for name in entries]
    if not all(each is not None and each["module"] in inside - modules.keys() for each in found):
        return entries
    return {
        tensor_name(_INSIDE + each["module"], each["part"]): entry
        for each, entry in zip(found, entries.values(), strict=True)
        if each is not None
    }


@contextlib.contextmanager
def _told_the_base(spec: AdapterSpec) -> Iterator[None]:
    """Add to a refusal inside the block for which base the adapter says that it was made."""
    try:
        yield
    except UnsupportedAdapter:
        raise
    except InvalidAdapter as error:
        if spec.base_model:
            error.message += f". The adapter was made for {spec.base_model[:200]!r} (base_model_name_or_path)"
        raise
