"""From a directory in PEFT's format to weights in serving layout: whole, checked and finite, or not at all.

``inspect_adapter`` checks all that needs no tensor data; ``read_adapter`` does that and reads. The chat
template and added tokens are adapters/tokens.py's. Nothing here knows names, versions or where the files
are kept.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from manylora.adapters.base_form import BaseForm, read_base_form
from manylora.adapters.errors import AdapterNotFound, InvalidAdapter, UnsupportedAdapter
from manylora.adapters.files import WEIGHTS_FILE, digest_of, present_files, read_json_object
from manylora.adapters.header import TensorEntry, header_limit, read_header
from manylora.adapters.spec import CONFIG_FILE, AdapterSpec
from manylora.adapters.tokens import AdapterText, read_text
from manylora.adapters.types import AdapterWeights, BaseModules, LoraPair, ModuleShape

MAX_ADAPTER_BYTES = 8 << 30
"""Limit of all files of an adapter when the caller names no other."""
_LISTED = 5
_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight")
_INSIDE = "model."
_TOKEN_MODULES = frozenset(("lm_head", "embed_tokens"))


@dataclass(frozen=True, slots=True)
class AdapterOutline:
    """An adapter whose config, header and shapes fit the base; no tensor was read."""

    spec: AdapterSpec
    rank_by_path: Mapping[str, int]
    """Rank of each adapted module, by full path."""
    text: AdapterText
    tensor_names: Mapping[str, str]
    """What the file calls the factors, by the names that peft's save_pretrained gives them."""
    trained_on: BaseForm | None = None
    """How its base was held in training, if it says so."""

    def rank_by_module(self) -> dict[str, int]:
        """Return the largest rank over all layers for each module name, as AdapterWeights does."""
        ranks: dict[str, int] = {}
        for path, rank in self.rank_by_path.items():
            module = path.rsplit(".", 1)[-1]
            ranks[module] = max(ranks.get(module, 0), rank)
        return ranks


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
    digest: str | None = None,
) -> LoadedAdapter:
    """Read and check the adapter in ``directory``; factors come in ``dtype``, the scale folded into b.

    ``digest`` saves hashing when it is known. Raises AdapterNotFound, UnsupportedAdapter or InvalidAdapter;
    the last names the file and the tensors. Takes memory for the factors, and one more pair while
    converting.
    """
    outline = inspect_adapter(directory, modules, max_rank=max_rank, vocab_size=vocab_size)
    pairs: dict[str, LoraPair] = {}
    try:
        with safe_open(directory / WEIGHTS_FILE, framework="pt") as file:
            for path in outline.rank_by_path:
                names = (outline.tensor_names[_tensor_name(path, half)] for half in "AB")
                lora_a, lora_b = map(file.get_tensor, names)
                pairs[path] = _convert(path, lora_a, lora_b, outline.spec.scale_of(path), dtype)
    except SafetensorError as error:
        raise InvalidAdapter(f"can't be read: {error}", file=WEIGHTS_FILE) from error
    known = digest or digest_of(directory, MAX_ADAPTER_BYTES)
    return LoadedAdapter(outline.spec, AdapterWeights(pairs), known, outline.text, outline.trained_on)


def inspect_adapter(
    directory: Path, modules: BaseModules, *, max_rank: int, vocab_size: int | None = None
) -> AdapterOutline:
    """Check everything but the tensors' values, in about a millisecond. Raises what read_adapter raises."""
    if not directory.is_dir():
        raise AdapterNotFound("the adapter's directory is not there")
    present_files(directory, MAX_ADAPTER_BYTES)
    spec = AdapterSpec.parse(read_json_object(directory / CONFIG_FILE))
    text, trained_on = read_text(directory, vocab_size), read_base_form(directory)
    _refuse_token_modules(spec)
    expected = (_tensor_name(path, half) for path in modules for half in "AB")
    entries = _of_whole_model(read_header(directory / WEIGHTS_FILE, header_limit(expected)), modules)
    with _told_the_base(spec):
        ranks = _expected_ranks(spec, modules, max_rank)
        _check_complete(entries, ranks)
        for path, rank in ranks.items():
            _check_shapes(entries, path, rank, modules[path])
    names = {name: entry.name for name, entry in entries.items()}
    return AdapterOutline(spec, ranks, text, names, trained_on)


def _of_whole_model(entries: Mapping[str, TensorEntry], modules: BaseModules) -> Mapping[str, TensorEntry]:
    """Return the tensors by the names that they have in a model with its head.

    An adapter that was trained without one (AutoModel, as sentence-transformers does) names modules from inside.
    """
    inside = {path.removeprefix(_INSIDE) for path in modules if path.startswith(_INSIDE)}
    found = [_FACTOR.fullmatch(name) for name in entries]
    if not all(each is not None and each["module"] in inside - modules.keys() for each in found):
        return entries
    return {
        _tensor_name(_INSIDE + each["module"], each["half"]): entry
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


def _tensor_name(path: str, half: str) -> str:
    return f"base_model.model.{path}.lora_{half}.weight"


def _refuse_token_modules(spec: AdapterSpec) -> None:
    for name in spec.named_targets():
        if not _TOKEN_MODULES.isdisjoint(name.split(".")):
            raise UnsupportedAdapter(
                f"target_modules names {name!r}: factors of the embedding and the head are not served yet",
                file=CONFIG_FILE,
            )


def _expected_ranks(spec: AdapterSpec, modules: BaseModules, max_rank: int) -> dict[str, int]:
    ranks = {path: spec.rank_of(path) for path in modules if spec.targets(path)}
    if not ranks:
        raise InvalidAdapter(
            f"no module of this base matches target_modules {_some(spec.named_targets())}; the base has"
            f" {_some(sorted({path.rsplit('.', 1)[-1] for path in modules}), 12)}",
            file=CONFIG_FILE,
        )
    path = max(ranks, key=ranks.__getitem__)
    if ranks[path] > max_rank:
        raise UnsupportedAdapter(
            f"rank {ranks[path]} at {path}; this server takes ranks up to {max_rank}", file=CONFIG_FILE
        )
    return ranks


def _check_complete(entries: Mapping[str, TensorEntry], ranks: Mapping[str, int]) -> None:
    expected = {_tensor_name(path, half) for path in ranks for half in "AB"}
    missing, left_over = sorted(expected - entries.keys()), sorted(entries.keys() - expected)
    if left_over:
        _explain_left_over(left_over)
    if missing:
        raise InvalidAdapter(
            f"{len(missing)} tensors that the config asks for are missing: {_some(missing)}",
            file=WEIGHTS_FILE,
            tensor=missing[0],
        )


def _explain_left_over(names: list[str]) -> None:
    for name in names:
        if not _TOKEN_MODULES.isdisjoint(name.split(".")):
            raise UnsupportedAdapter(
                "tensors of the embedding and the head are not served yet", file=WEIGHTS_FILE, tensor=name
            )
    factors = sum(_FACTOR.fullmatch(name) is not None for name in names)
    why = (
        "are of modules that the config or the base lacks"
        if factors == len(names)
        else "are not LoRA factors"
    )
    raise InvalidAdapter(f"{len(names)} tensors {why}: {_some(names)}", file=WEIGHTS_FILE, tensor=names[0])


def _check_shapes(entries: Mapping[str, TensorEntry], path: str, rank: int, module: ModuleShape) -> None:
    wanted = {"A": (rank, module.in_features), "B": (module.out_features, rank)}
    for half, shape in wanted.items():
        found = entries[_tensor_name(path, half)]
        if found.shape != shape:
            raise InvalidAdapter(
                f"has shape {list(found.shape)}; rank {rank} on this base needs {list(shape)}",
                file=WEIGHTS_FILE,
                tensor=found.name,
            )


def _convert(path: str, lora_a: Tensor, lora_b: Tensor, scale: float, dtype: torch.dtype) -> LoraPair:
    """Return a [r, in] and b [r, out]; the scale is applied in float32, before rounding to ``dtype``."""
    for half, tensor in (("A", lora_a), ("B", lora_b)):
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidAdapter("holds NaN or Inf", file=WEIGHTS_FILE, tensor=_tensor_name(path, half))
    a = torch.empty(lora_a.shape, dtype=dtype).copy_(lora_a)
    b = torch.empty(lora_b.shape[::-1], dtype=dtype).copy_((lora_b.float() * scale).T)
    for half, tensor in (("A", a), ("B", b)):
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidAdapter(
                f"overflows {dtype} once scaled by {scale:g}",
                file=WEIGHTS_FILE,
                tensor=_tensor_name(path, half),
            )
    return LoraPair(a, b)


def _some(names: list[str] | tuple[str, ...], limit: int = _LISTED) -> str:
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")
