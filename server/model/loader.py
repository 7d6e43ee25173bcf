"""From a checkpoint directory to DecoderWeights, tensor by tensor.

Each matrix is read, quantised if asked, packed by the backend and let go before the next, so that loading takes
the 4-bit model and one fused matrix. Strict: every tensor is used and every weight is found, or nothing loads.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from manylora.quant.checkpoint import Checkpoint
from manylora.quant.config import stored_format
from manylora.quant.dense import DenseTensor
from manylora.quant.errors import CorruptCheckpoint
from manylora.quant.format import QuantizedTensor, StoredFormat, read_dense, show_dense
from manylora.quant.nf4 import DOUBLE_QUANT
from manylora.quant.served_form import ServedForm, served_form
from manylora.server.kernels.backend import AnyBackend, WeightSource
from manylora.server.kernels.weights import DecoderWeights, EmbeddingWeight, LayerWeights, LinearWeight
from manylora.server.model.config import ModelConfig
from manylora.server.model.errors import ModelMissing, UnsupportedModel, WeightsMismatch
from manylora.server.model.families import model_config
from manylora.server.model.rope import rope_tables

Quantization = Literal["auto", "nf4", "int8", "none"]
LoadedForm = Literal["nf4", "int8"]
"""What 16-bit weights are quantised to as they are loaded."""
Progress = Callable[[int, int], None]
"""Called with the number of layers loaded and of all layers."""

# Buffers that old checkpoints carry and nobody reads.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".masked_bias")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FUSED = {"qkv": ("q_proj", "k_proj", "v_proj"), "o": ("o_proj",)}
MLP = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}


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
) -> tuple[ModelConfig, DecoderWeights, LoadReport]:
    """Load a model directory for ``backend``.

    auto: as it is stored, but 16-bit weights in NF4, unless config.json says that they are served unquantised; nf4 and
    int8 hold 16-bit weights so, none holds them as they are. Raises ModelError or manylora.quant.errors.QuantError.
    """
    started = time.monotonic()
    raw = read_config(directory)
    config, stored = model_config(raw), stored_format(directory, raw)
    _check_choice(stored, quantization)
    own = served_form(raw)
    quantizer = _Quantizer(quantised_at_load(stored, own, quantization), double_quant, backend)
    checkpoint = Checkpoint(directory)
    reader = _Reader(checkpoint, config, stored, backend, quantizer)
    layers = []
    for index in range(config.num_layers):
        layers.append(reader.layer(index))
        progress(index + 1, config.num_layers)
    weights = reader.finish(tuple(layers))
    report = LoadReport(
        quantizer.name(stored),
        reader.linear_bytes,
        reader.linear_weights,
        reader.other_bytes,
        time.monotonic() - started,
        checkpoint.notes + (() if own is None else own.costs(backend.dtype, quantised=quantizer.form)),
        quantizer.form or stored.kind,
        double_quant if quantizer.form == "nf4" else stored.double_quant,
        stored.kind == "dense",
    )
    return config, weights, report


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


@dataclass(frozen=True, slots=True)
class _Quantizer:
    """What happens to a 16-bit matrix on its way in."""

    form: LoadedForm | None
    double_quant: bool
    backend: AnyBackend

    def name(self, stored: StoredFormat) -> str:
        """Return how linear layers are held, for the report."""
        if self.form is not None:
            return "nf4 (double quantised)" if self.form == "nf4" and self.double_quant else self.form
        return str(self.backend.dtype).removeprefix("torch.") if stored.kind == "dense" else stored.kind

    def __call__(self, matrix: QuantizedTensor) -> WeightSource:
        if not isinstance(matrix, DenseTensor):
            return matrix
        # transformers casts first and quantises then, on the device; so must we, to get the same codes.
        weight = matrix.weight.to(self.backend.device, self.backend.dtype)
        if self.form is None:
            return DenseTensor(weight)
        if self.form == "int8":
            return self.backend.quantize_int8(weight)
        return self.backend.quantize_nf4(weight, double_quant=self.double_quant)


@dataclass
class _Reader:
    """Reads a decoder's tensors and remembers which ones it took."""

    checkpoint: Checkpoint
    config: ModelConfig
    stored: StoredFormat
    backend: AnyBackend
    quantizer: _Quantizer
    linear_bytes: int = 0
    linear_weights: int = 0
    other_bytes: int = 0
    taken: set[str] = field(default_factory=set)

    def layer(self, index: int) -> LayerWeights:
        block = f"model.layers.{index}"
        config, hidden = self.config, (self.config.hidden_size,)
        head = (config.head_dim,)
        attention = f"{block}.self_attn"
        return LayerWeights(
            attn_norm=self.vector(f"{block}.input_layernorm.weight", hidden),
            qkv=self.linear(index, FUSED["qkv"], bias=config.qkv_bias),
            q_norm=self.vector(f"{attention}.q_norm.weight", head) if config.qk_norm else None,
            k_norm=self.vector(f"{attention}.k_norm.weight", head) if config.qk_norm else None,
            o=self.linear(index, FUSED["o"], bias=config.output_bias),
            mlp_norm=self.vector(f"{block}.post_attention_layernorm.weight", hidden),
            gate_up=self.linear(index, MLP["gate_up"], bias=config.mlp_bias),
            down=self.linear(index, MLP["down"], bias=config.mlp_bias),
            window=config.windows[index] if config.windows else None,
        )

    def finish(self, layers: tuple[LayerWeights, ...]) -> DecoderWeights:
        config = self.config
        embedding, head = self._embedding_and_head()
        norm = self.vector("model.norm.weight", (config.hidden_size,))
        self._check_all_taken()
        cos, sin = rope_tables(config.rope, config.head_dim, config.max_position, self.backend.device)
        return DecoderWeights(config.shape, config.rms_norm_eps, cos, sin, embedding, layers, norm, head)

    def _embedding_and_head(self) -> tuple[EmbeddingWeight, LinearWeight]:
        matrix = self._embedding()
        own = self._head_that_differs(matrix) if self.config.tied_head else None
        tied = self.config.tied_head and own is None
        embedding = self.backend.prepare_embedding(matrix, tied=tied)
        self.other_bytes += embedding.nbytes
        if tied:
            return embedding, self.backend.tie_head(embedding)
        del matrix  # before the next is read
        head = self.backend.prepare_head(self._own_head() if own is None else own)
        self.other_bytes += head.nbytes
        return embedding, head

    def _embedding(self) -> Tensor:
        shape = (self.config.vocab_size, self.config.hidden_size)
        names = self.checkpoint.names()
        if self.config.tied_head and EMBEDDING not in names and HEAD in names:
            return self.show(HEAD, shape)  # either name may hold a tied matrix
        return self.show(EMBEDDING, shape)

    def _head_that_differs(self, embedding: Tensor) -> QuantizedTensor | None:
        """Return the head that a checkpoint holds though its config ties it, if it is another; as transformers does."""
        if HEAD not in self.checkpoint.names() - self.taken:
            return None
        own = self.show(HEAD, (self.config.vocab_size, self.config.hidden_size))
        return None if torch.equal(own, embedding) else DenseTensor(own)

    def _own_head(self) -> QuantizedTensor:
        """Read the head. It may be quantised, where a GPTQ or AWQ checkpoint has it so."""
        shape = (self.config.vocab_size, self.config.hidden_size)
        if not self.stored.packs(self.checkpoint, "lm_head"):
            return DenseTensor(self.show(HEAD, shape))
        stored, names = self.stored.read(self.checkpoint, "lm_head")
        self.taken |= names
        self._check(HEAD, stored.shape, shape)
        return stored

    def _check_all_taken(self) -> None:
        left = sorted(
            name for name in self.checkpoint.names() - self.taken if not name.endswith(IGNORED_SUFFIXES)
        )
        if left:
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            raise WeightsMismatch(
                f"{self.checkpoint.locate(left[0])} holds tensors that its config doesn't: "
                f"{', '.join(left[:5])}{more}"
            )

    def vector(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Read a norm or bias."""
        tensor = self._taken(name, read_dense(self.checkpoint, name), shape)
        self.other_bytes += tensor.nbytes
        return tensor

    def show(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a matrix that the checkpoint has unquantised, for the backend to read: see Checkpoint.show."""
        return self._taken(name, show_dense(self.checkpoint, name), shape)

    def _taken(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        self.taken.add(name)
        self._check(name, tuple(tensor.shape), shape)
        return tensor.to(self.backend.device, self.backend.dtype)

    def linear(self, index: int, modules: tuple[str, ...], *, bias: bool) -> LinearWeight:
        """Read, quantise and pack the stack of a layer's ``modules``."""
        shapes, paths = self.config.module_shapes(), self.config.module_paths(index)
        parts, biases = [], []
        for module in modules:
            matrix, names = self.stored.show(self.checkpoint, paths[module])
            self.taken |= names
            self._check(f"{paths[module]}.weight", matrix.shape, shapes[module])
            try:
                parts.append(self.quantizer(matrix))
            except ValueError as error:
                raise CorruptCheckpoint(f"{paths[module]}.weight: {error}") from None
            del matrix  # before the next is read
            biases += self._bias(f"{paths[module]}.bias", shapes[module][0], expected=bias)
        prepared = self.backend.prepare(parts, torch.cat(biases) if biases else None)
        self.linear_bytes += prepared.nbytes
        self.linear_weights += prepared.shape[0] * prepared.shape[1]
        return prepared

    def _bias(self, name: str, size: int, *, expected: bool) -> list[Tensor]:
        if expected:
            return [self.vector(name, (size,))]
        if name in self.checkpoint.names() and self.stored.kind == "gptq":
            # GPTQ writes a bias for every layer; where the model has none it is zero.
            self.taken.add(name)
            if self.checkpoint.read(name).any():
                raise WeightsMismatch(f"{name} is not zero, but the config says that this layer has no bias")
        return []

    def _check(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise WeightsMismatch(
                f"{self.checkpoint.locate(name)}: {name} is {list(found)}, but the config says {list(expected)}"
            )
