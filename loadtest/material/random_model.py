"""Models and adapters of noise in given shapes, made in memory on the device: a step's time does not depend on values.

Checkpoints on disk are loadtest/material/checkpoints.py's. Imports torch, transformers and safetensors, nothing else.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from manylora.adapters.types import AdapterWeights, LoraPair
from manylora.loadtest.material.checkpoints import SHAPES, BaseShape
from manylora.quant.dense import DenseTensor
from manylora.quant.nf4 import Nf4Tensor
from manylora.server.kernels.backend import AnyBackend, WeightSource
from manylora.server.kernels.choose import AUTO, PLAIN, choose_backend
from manylora.server.kernels.weights import DecoderWeights, LayerWeights, LinearWeight
from manylora.server.model.config import ModelConfig
from manylora.server.model.decoder import Decoder
from manylora.server.model.families import model_config
from manylora.server.model.loader import Quantization, load_weights
from manylora.server.model.rope import rope_tables

DTYPES: Mapping[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}
QUANTIZATIONS: tuple[Quantization, ...] = ("none", "nf4")


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """Which model to build, and how to hold it."""

    source: str
    """A name of checkpoints.SHAPES, or a checkpoint's directory."""
    quantization: Quantization
    """nf4 or none; auto takes a checkpoint as the server would."""
    dtype: str = "bfloat16"
    device: str = "cpu"
    kernels: str = AUTO
    """Of a CPU: auto, plain, or a level of the native ones."""
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        """Refuse what isn't there."""
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        if self.source not in SHAPES and not Path(self.source).is_dir():
            raise ValueError(f"{self.source!r} is neither a directory nor one of {', '.join(SHAPES)}")


def named_config(name: str) -> ModelConfig:
    """Return the decoder's config of one of checkpoints.SHAPES."""
    return config_of(SHAPES[name])


def config_of(shape: BaseShape) -> ModelConfig:
    """Return the decoder's config of a shape."""
    raw = json.loads(shape.config(shape.vocab_size - 1).to_json_string())
    return model_config({**raw, "model_type": shape.family})


def build_decoder(choice: ModelChoice) -> Decoder:
    """Return the decoder that ``choice`` names: loaded, or made of noise."""
    device = torch.device(choice.device)
    # Native kernels have no finer weights than bfloat16.
    kernels = PLAIN if choice.dtype == "float32" else choice.kernels
    backend = choose_backend(device, DTYPES[choice.dtype], kernels, cuda_graphs=choice.cuda_graphs)
    if choice.source not in SHAPES:
        config, weights, _ = load_weights(Path(choice.source), backend, quantization=choice.quantization)
        return Decoder(config, weights, backend)
    config = named_config(choice.source)
    return Decoder(config, random_weights(config, backend, nf4=choice.quantization != "none"), backend)


def random_weights(config: ModelConfig, backend: AnyBackend, *, nf4: bool) -> DecoderWeights:
    """Return a decoder of noise from torch's own random stream; embedding, norms and head are never 4-bit."""
    shapes = config.module_shapes()

    def ones(width: int) -> Tensor:
        return torch.ones(width, dtype=backend.dtype, device=backend.device)

    def linear(*modules: str, bias: bool) -> LinearWeight:
        parts = [_matrix(backend, *shapes[module], nf4=nf4) for module in modules]
        width = sum(part.shape[0] for part in parts)
        return backend.prepare(parts, torch.zeros(width) if bias else None)

    layers = tuple(
        LayerWeights(
            attn_norm=ones(config.hidden_size),
            qkv=linear("q_proj", "k_proj", "v_proj", bias=config.qkv_bias),
            q_norm=ones(config.head_dim) if config.qk_norm else None,
            k_norm=ones(config.head_dim) if config.qk_norm else None,
            o=linear("o_proj", bias=config.output_bias),
            mlp_norm=ones(config.hidden_size),
            gate_up=linear("gate_proj", "up_proj", bias=config.mlp_bias),
            down=linear("down_proj", bias=config.mlp_bias),
            window=config.windows[index] if config.windows else None,
        )
        for index in range(config.num_layers)
    )
    size = (config.vocab_size, config.hidden_size)
    tied = config.tied_head
    embedding = backend.prepare_embedding(_noise(backend, *size), tied=tied)
    return DecoderWeights(
        config.shape,
        config.rms_norm_eps,
        *rope_tables(config.rope, config.head_dim, config.max_position, backend.device),
        embedding,
        layers,
        ones(config.hidden_size),
        backend.tie_head(embedding) if tied else backend.prepare_head(DenseTensor(_noise(backend, *size))),
        tied,
    )


def random_adapter(
    config: ModelConfig, rank: int, dtype: torch.dtype, device: torch.device, seed: int
) -> AdapterWeights:
    """Return an adapter of noise on all seven modules of every layer, strong enough to change greedy answers."""
    generator = torch.Generator(device).manual_seed(seed)

    def noise(rows: int, columns: int, scale: float) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device).mul_(scale).to(dtype)

    return AdapterWeights(
        {
            path: LoraPair(noise(rank, wide, wide**-0.5), noise(rank, out, 0.5 * rank**-0.5))
            for path, (out, wide) in config.base_modules().items()
        }
    )


class SyntheticTokens:
    """A TokenDecoder for models without a tokenizer: each id stands for a few letters, looked up as in a real one."""

    strips_first_space = False

    def __init__(self, vocab_size: int) -> None:
        self._bytes = [f" {token_id:x}".encode() for token_id in range(vocab_size)]

    def token_bytes(self, token_id: int) -> bytes:
        """Return the id in letters and digits, after a space."""
        return self._bytes[token_id]


def _noise(backend: AnyBackend, out: int, wide: int) -> Tensor:
    return torch.randn(out, wide, dtype=backend.dtype, device=backend.device).mul_(wide**-0.5)


def _matrix(backend: AnyBackend, out: int, wide: int, *, nf4: bool) -> WeightSource:
    if not nf4:
        return DenseTensor(_noise(backend, out, wide))
    codes = torch.randint(0, 256, (out * wide // 2,), dtype=torch.uint8, device=backend.device)
    # Codes spread evenly over −1…1 have a standard deviation of about 0.55: outputs keep the inputs' size.
    absmax = torch.empty(out * wide // 64, device=backend.device).uniform_(1.2, 2.4).mul_(wide**-0.5)
    return Nf4Tensor(codes, absmax, (out, wide))
