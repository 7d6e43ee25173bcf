"""What the server computes with an adapter as it was saved: its own reader, loader and decoder."""

from pathlib import Path

import torch
from torch import Tensor

from manylora.adapters.reader import LoadedAdapter, read_adapter
from manylora.adapters.types import ModuleShape, ServedBase
from manylora.adapters.vocabulary import BaseVocabulary
from manylora.server.model.decoder_base import DecoderBase
from manylora.server.model.families import model_config
from manylora.server.model.loader import read_config
from manylora.training.bases.load import Base
from tests.server.model.steps import Stream, all_logits, load, place, step

MAX_RANK = 256


class AnyBase:
    """Stands for a base that isn't loaded: whether an adapter is taken doesn't depend on what it holds."""

    def row_norms(self, path: str, a: Tensor, b: Tensor) -> Tensor:
        return torch.ones(len(b))

    def bias(self, path: str) -> Tensor:
        return torch.zeros(1)


def read_for(base: Base, adapter: Path, served: ServedBase | None = None) -> LoadedAdapter:
    """Read an adapter for the base as the server does, or raise what it answers."""
    config = model_config(read_config(base.directory))
    shapes = config.module_shapes()
    modules = {
        path: ModuleShape(*shapes[module], config.has_bias(module))
        for layer in range(config.num_layers)
        for module, path in config.module_paths(layer).items()
    }
    return read_adapter(
        adapter,
        modules,
        max_rank=MAX_RANK,
        dtype=torch.float32,
        vocab_size=config.vocab_size,
        base=served or AnyBase(),
        vocabulary=BaseVocabulary(config.vocab_size, config.hidden_size, config.tied_head),
    )


def served_logits(base: Base, adapter: Path, tokens: list[int]) -> Tensor:
    """Return logits [tokens, vocabulary] of the server's decoder, its base held as ``base`` is."""
    model = load(
        base.directory,
        quantization="nf4" if base.from_16bit else "auto" if base.kind != "dense" else "none",
        double_quant=base.double_quant,
    )
    [ranges] = place(model, [read_for(base, adapter, DecoderBase(model.decoder)).weights])
    stream = Stream(0, tokens, ((ranges, 1.0),))
    step(model, [(stream, len(tokens))])
    return all_logits(stream)
