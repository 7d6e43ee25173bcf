"""A decoder's tensors read from a checkpoint, one at a time, quantised if asked and prepared by the backend.

Strict: every tensor is used and every weight is found.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from manylora.quant.checkpoint import Checkpoint
from manylora.quant.dense import DenseTensor
from manylora.quant.errors import CorruptCheckpoint
from manylora.quant.format import QuantizedTensor, StoredFormat, read_dense, show_dense
from manylora.server.kernels.backend import AnyBackend, WeightSource
from manylora.server.kernels.weights import DecoderWeights, EmbeddingWeight, LayerWeights, LinearWeight
from manylora.server.model.config import FUSED, ModelConfig
from manylora.server.model.errors import WeightsMismatch
from manylora.server.model.rope import rope_tables

LoadedForm = Literal["nf4", "int8"]
"""What 16-bit weights are quantised to as they are loaded."""
Progress = Callable[[int, int], None]
"""Called with the bytes of the checkpoint that are loaded, and all of them."""

# Buffers that old checkpoints carry and nobody reads.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".masked_bias")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Quantizer:
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
        """Return the matrix as it is to be held. Raises ValueError for values that are not finite."""
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
class Reader:
    """Reads a decoder's tensors and remembers which ones it took."""

    checkpoint: Checkpoint
    config: ModelConfig
    stored: StoredFormat
    backend: AnyBackend
    quantizer: Quantizer
    progress: Progress
    done: int = 0
    """Bytes of the checkpoint that were read."""
    taken: set[str] = field(default_factory=set)

    def decoder(self) -> DecoderWeights:
        """Read all of it. Embedding and head, which are the largest, are read before the layers take memory."""
        config = self.config
        embedding, head, tied = self._embedding_and_head()
        norm = self.vector("model.norm.weight", (config.hidden_size,))
        layers = tuple(self.layer(index) for index in range(config.num_layers))
        self._check_all_taken()
        rope = rope_tables(config.rope, config.head_dim, config.max_position, self.backend.device)
        total = self.checkpoint.nbytes
        self.progress(total, total)
        return DecoderWeights(config.shape, config.rms_norm_eps, *rope, embedding, layers, norm, head, tied)

    def layer(self, index: int) -> LayerWeights:
        """Read a block."""
        block = f"model.layers.{index}"
        config, hidden = self.config, (self.config.hidden_size,)
        head = (config.head_dim,)
        attention = f"{block}.self_attn"
        return LayerWeights(
            attn_norm=self.vector(f"{block}.input_layernorm.weight", hidden),
            qkv=self.linear(index, "qkv", bias=config.qkv_bias),
            q_norm=self.vector(f"{attention}.q_norm.weight", head) if config.qk_norm else None,
            k_norm=self.vector(f"{attention}.k_norm.weight", head) if config.qk_norm else None,
            o=self.linear(index, "o", bias=config.output_bias),
            mlp_norm=self.vector(f"{block}.post_attention_layernorm.weight", hidden),
            gate_up=self.linear(index, "gate_up", bias=config.mlp_bias),
            down=self.linear(index, "down", bias=config.mlp_bias),
            window=config.windows[index] if config.windows else None,
        )

    def _embedding_and_head(self) -> tuple[EmbeddingWeight, LinearWeight, bool]:
        """Return both, and whether they are one."""
        matrix = self._embedding()
        own = self._head_that_differs(matrix) if self.config.tied_head else None
        tied = self.config.tied_head and own is None
        embedding = self.backend.prepare_embedding(matrix, tied=tied)
        del matrix  # before the next is read
        if tied:
            return embedding, self.backend.tie_head(embedding), True
        return embedding, self.backend.prepare_head(self._own_head() if own is None else own), False

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
        return self._taken(name, read_dense(self.checkpoint, name), shape)

    def show(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return a matrix that the checkpoint has unquantised, for the backend to read: see Checkpoint.show."""
        return self._taken(name, show_dense(self.checkpoint, name), shape)

    def _taken(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        self.taken.add(name)
        self._check(name, tuple(tensor.shape), shape)
        self._advance(tensor.nbytes)
        return tensor.to(self.backend.device, self.backend.dtype)

    def linear(self, index: int, name: str, *, bias: bool) -> LinearWeight:
        """Read, quantise and prepare a layer's matrix: one of FUSED."""
        shapes, paths = self.config.module_shapes(), self.config.module_paths(index)
        parts, biases = [], []
        for module in FUSED[name]:
            matrix, names = self.stored.show(self.checkpoint, paths[module])
            self.taken |= names
            self._check(f"{paths[module]}.weight", matrix.shape, shapes[module])
            try:
                parts.append(self.quantizer(matrix))
            except ValueError as error:
                raise CorruptCheckpoint(f"{paths[module]}.weight: {error}") from None
            self._advance(matrix.nbytes)
            del matrix  # before the next is read
            biases += self._bias(f"{paths[module]}.bias", shapes[module][0], expected=bias)
        return self.backend.prepare(parts, torch.cat(biases) if biases else None)

    def _advance(self, nbytes: int) -> None:
        self.done += nbytes
        self.progress(self.done, self.checkpoint.nbytes)

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
