"""A decoder's prepared weights as tensors by name, and what they depend on: what the weight cache keeps of a model."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from manylora.quant.identity import weights_identity
from manylora.quant.weight_files import choose_weights
from manylora.server.kernels.backend import AnyBackend
from manylora.server.kernels.kept import Apart, Keeper
from manylora.server.kernels.weights import DecoderWeights, LayerWeights, LinearWeight
from manylora.server.model.config import FUSED, ModelConfig
from manylora.server.model.rope import rope_tables

DIGITS = 32
NORMS = {"attn_norm": "hidden_size", "mlp_norm": "hidden_size", "q_norm": "head_dim", "k_norm": "head_dim"}
EMBEDDING, HEAD, FINAL_NORM = "embedding", "head", "final_norm"


@dataclass(frozen=True, slots=True)
class KeptModel:
    """Prepared weights: facts of each matrix by its name, and all tensors, as "layer.3.qkv/0.codes"."""

    facts: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def kept_key(directory: Path, form: str, keeper: Keeper) -> str:
    """Return the digits by which prepared weights of a checkpoint are found again.

    Of what its files hold (weights_identity reads samples of all tensors), of their sizes and times, of the form that
    the weights are held in and of the backend's layout. A file that is written to in place has another time; one that
    is put in another's place, its time and all, has other contents. Raises CorruptCheckpoint, OSError.
    """
    files = []
    for name in choose_weights(directory).shards:
        status = (directory / name).stat()
        files.append((name, status.st_size, status.st_mtime_ns))
    said = json.dumps([weights_identity(directory), files, form, keeper.layout])
    return hashlib.sha256(said.encode()).hexdigest()[:DIGITS]


def take_apart(weights: DecoderWeights, keeper: Keeper) -> KeptModel:
    """Return a model's prepared weights as tensors, which share their memory."""
    facts: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {FINAL_NORM: weights.final_norm}

    def add(name: str, weight: object) -> None:
        apart = keeper.take_apart(weight)
        facts[name] = apart.facts
        tensors.update({f"{name}/{part}": tensor for part, tensor in apart.tensors.items()})

    for number, layer in enumerate(weights.layers):
        for name in FUSED:
            add(f"layer.{number}.{name}", getattr(layer, name))
        norms = {f"layer.{number}.{name}": getattr(layer, name) for name in NORMS}
        tensors.update({name: norm for name, norm in norms.items() if norm is not None})
    add(EMBEDDING, weights.embedding)
    if not weights.tied:
        add(HEAD, weights.head)
    return KeptModel(facts, tensors)


def put_together(kept: KeptModel, config: ModelConfig, backend: AnyBackend, keeper: Keeper) -> DecoderWeights:
    """Return the weights that were taken apart. Raises ValueError if they aren't those of such a model."""
    reader = _Reader(kept, config, backend, keeper)
    vocabulary = (config.vocab_size, config.hidden_size)
    embedding = reader.matrix(EMBEDDING, vocabulary)
    tied = HEAD not in kept.facts
    return DecoderWeights(
        config.shape,
        config.rms_norm_eps,
        *rope_tables(config.rope, config.head_dim, config.max_position, backend.device),
        embedding,
        tuple(reader.layer(number) for number in range(config.num_layers)),
        reader.norm(FINAL_NORM, config.hidden_size),
        backend.tie_head(embedding) if tied else reader.matrix(HEAD, vocabulary),
        tied,
    )


@dataclass(frozen=True, slots=True)
class _Reader:
    kept: KeptModel
    config: ModelConfig
    backend: AnyBackend
    keeper: Keeper

    def layer(self, number: int) -> LayerWeights:
        config, shapes = self.config, self.config.module_shapes()
        found: dict[str, Any] = {"window": config.windows[number] if config.windows else None}
        for name, size in NORMS.items():
            there = config.qk_norm or size == "hidden_size"
            found[name] = self.norm(f"layer.{number}.{name}", getattr(config, size)) if there else None
        for name, modules in FUSED.items():
            out = sum(shapes[module][0] for module in modules)
            found[name] = self.matrix(f"layer.{number}.{name}", (out, shapes[modules[0]][1]))
        assert found.keys() == {field.name for field in fields(LayerWeights)}
        return LayerWeights(**found)

    def norm(self, name: str, width: int) -> Tensor:
        tensor = self.kept.tensors.get(name)
        if tensor is None or tuple(tensor.shape) != (width,) or not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} is not {width} floats")
        return tensor.to(self.backend.device, self.backend.dtype, copy=True)

    def matrix(self, name: str, shape: tuple[int, int]) -> LinearWeight:
        facts, start = self.kept.facts.get(name), f"{name}/"
        if not isinstance(facts, Mapping):
            raise ValueError(f"{name} is missing")
        parts = self._parts(start)
        weight = self.keeper.put_together(Apart(facts, parts))
        if weight.shape != shape:
            raise ValueError(f"{name} is {list(weight.shape)}, not {list(shape)}")
        return weight

    def _parts(self, start: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(start): tensor
            for name, tensor in self.kept.tensors.items()
            if name.startswith(start)
        }
