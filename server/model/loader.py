"""From a checkpoint directory to DecoderWeights, tensor by tensor.

Each matrix is read, quantised if asked, packed by the backend and let go before the next, so that loading takes
the 4-bit model and one fused matrix. Strict: every tensor is used and every weight is found, or nothing loads.
"""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from manylora.quant.checkpoint import Checkpoint
from manylora.quant.config import stored_format
from manylora.quant.format import StoredFormat
from manylora.quant.nf4 import DOUBLE_QUANT
from manylora.quant.served_form import ServedForm, served_form
from manylora.server.kernels.backend import AnyBackend
from manylora.server.kernels.weights import DecoderWeights, EmbeddingWeight, LinearWeight
from manylora.server.model.config import ModelConfig
from manylora.server.model.errors import ModelMissing, UnsupportedModel
from manylora.server.model.families import model_config
from manylora.server.model.kept_model import KeptModel, kept_key, put_together, take_apart
from manylora.server.model.reader import LoadedForm, Progress, Quantizer, Reader
from manylora.server.model.weight_cache import WeightCache

Quantization = Literal["auto", "nf4", "int8", "none"]


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What was loaded, for the banner."""

    format: str
    """How linear layers are held: "nf4", "nf4 (double quantised)", "int8", "gptq", "awq", "bfloat16", …"""
    linear_bytes: int
    linear_weights: int
    other_bytes: int
    """Embedding, norms and head."""
    seconds: float
    notes: tuple[str, ...] = ()
    """Sentences about files that look like its weights and were not read, and about what serving it so loses."""
    kind: str = "dense"
    """How linear layers are held: dense, nf4, int8, gptq or awq."""
    double_quant: bool = False
    """Of nf4: whether the scales are quantised too."""
    from_16bit: bool = True
    """Whether the checkpoint isn't quantised itself."""
    mapped: bool = False
    """Whether the weights were prepared by an earlier start, and are mapped."""

    @property
    def bits_per_weight(self) -> float:
        """Bits of a linear layer's weight, scales included."""
        return 8 * self.linear_bytes / self.linear_weights


def read_config(directory: Path) -> Mapping[str, object]:
    """Return a model directory's config.json. Raises ModelMissing."""
    path = directory / "config.json"
    try:
        config: object = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelMissing(
            f"{path} is missing: a model directory holds config.json and safetensors"
        ) from None
    except OSError as error:
        raise ModelMissing(f"{path} can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelMissing(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ModelMissing(f"{path} is not an object")
    return config


def load_weights(
    directory: Path,
    backend: AnyBackend,
    *,
    quantization: Quantization = "auto",
    double_quant: bool = DOUBLE_QUANT,
    progress: Progress = lambda done, total: None,
    cache: WeightCache | None = None,
) -> tuple[ModelConfig, DecoderWeights, LoadReport]:
    """Load a model directory for ``backend``.

    auto: as it is stored, but 16-bit weights in NF4, unless config.json says that they are served unquantised; nf4 and
    int8 hold 16-bit weights so, none holds them as they are. With a ``cache``, weights that an earlier start prepared
    are mapped; what this one prepares waits there for its ``write``. Raises ModelError or
    manylora.quant.errors.QuantError.
    """
    started = time.monotonic()
    raw = read_config(directory)
    config, stored = model_config(raw), stored_format(directory, raw)
    _check_choice(stored, quantization)
    own = served_form(raw)
    quantizer = Quantizer(quantised_at_load(stored, own, quantization), double_quant, backend)
    reader = Reader(Checkpoint(directory), config, stored, backend, quantizer, progress)
    weights, mapped = _kept_or_read(reader, cache)
    linear = list(_linear(weights))
    report = LoadReport(
        quantizer.name(stored),
        sum(matrix.nbytes for matrix in linear),
        sum(matrix.shape[0] * matrix.shape[1] for matrix in linear),
        sum(each.nbytes for each in _others(weights)),
        time.monotonic() - started,
        reader.checkpoint.notes + (() if own is None else own.costs(backend.dtype, quantised=quantizer.form)),
        quantizer.form or stored.kind,
        double_quant if quantizer.form == "nf4" else stored.double_quant,
        stored.kind == "dense",
        mapped,
    )
    return config, weights, report


def _kept_or_read(reader: Reader, cache: WeightCache | None) -> tuple[DecoderWeights, bool]:
    """Return the weights, and whether they were kept by an earlier start."""
    backend, keeper, kind = reader.backend, reader.backend.keeper, reader.quantizer.form or reader.stored.kind
    # Weights that aren't quantised are copied in another order: what that takes isn't worth their size on the disk.
    if cache is None or keeper is None or kind == "dense":
        return reader.decoder(), False
    form, directory = reader.quantizer.name(reader.stored), reader.checkpoint.directory
    key = kept_key(directory, form, keeper)

    def found(kept: KeptModel) -> DecoderWeights:
        return put_together(kept, reader.config, backend, keeper)

    weights = cache.find(key, found)
    if weights is not None:
        return weights, True
    weights = reader.decoder()
    about = {"base": str(directory.absolute()), "weights": form, "layout": keeper.layout}
    cache.keep_later(key, take_apart(weights, keeper), about)
    return weights, False


def _linear(weights: DecoderWeights) -> Iterator[LinearWeight]:
    for layer in weights.layers:
        yield from (layer.qkv, layer.o, layer.gate_up, layer.down)


def _others(weights: DecoderWeights) -> Iterator[Tensor | LinearWeight | EmbeddingWeight]:
    """Yield embedding, norms and head, each storage once."""
    yield weights.embedding
    yield weights.final_norm
    if not weights.tied:
        yield weights.head
    for layer in weights.layers:
        norms = (layer.attn_norm, layer.q_norm, layer.k_norm, layer.mlp_norm)
        yield from (norm for norm in norms if norm is not None)


def quantised_at_load(
    stored: StoredFormat, own: ServedForm | None, quantization: Quantization
) -> LoadedForm | None:
    """Return in what form linear layers are brought on their way in; ``own`` is what config.json says about it."""
    if stored.kind != "dense" or quantization == "none" or (quantization == "auto" and own is not None):
        return None
    return "int8" if quantization == "int8" else "nf4"


def _check_choice(stored: StoredFormat, quantization: Quantization) -> None:
    if quantization == "none" and stored.kind != "dense":
        raise UnsupportedModel(
            f"--quantization none: the checkpoint is {stored.kind}; use auto to serve it as it is"
        )
    if quantization not in ("auto", "none", stored.kind) and stored.kind != "dense":
        raise UnsupportedModel(
            f"--quantization {quantization}: the checkpoint is {stored.kind} already; use auto"
        )
