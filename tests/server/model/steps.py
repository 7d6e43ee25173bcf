"""Runs a decoder by hand: sequences with their own KV blocks, mixed into steps as a test wants them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from manylora.adapters.types import AdapterWeights, LoraPair
from manylora.server.kernels.backend import AnyBackend
from manylora.server.kernels.plain import PlainBackend
from manylora.server.kernels.step import (
    AdapterRanges,
    AttentionMetadata,
    Ints,
    RankRange,
    StepAdapters,
    StepBatch,
)
from manylora.server.model.config import ModelConfig
from manylora.server.model.decoder import Decoder
from manylora.server.model.loader import Quantization, load_weights
from manylora.server.model.served import ServedModel

BLOCK = 16
BLOCKS_EACH = 32
CPU = torch.device("cpu")


@dataclass
class Stream:
    """A sequence: its tokens, how many are computed, and the adapters it uses."""

    number: int
    tokens: list[int]
    adapters: tuple[tuple[AdapterRanges, float], ...] = ()
    computed: int = 0
    logits: list[Tensor] = field(default_factory=list)
    finite: list[bool] = field(default_factory=list)

    @property
    def table(self) -> list[int]:
        # Backwards, so that no test passes because blocks happen to lie in order.
        first = 1 + self.number * BLOCKS_EACH
        return list(range(first + BLOCKS_EACH - 1, first - 1, -1))


def load(
    directory: Path,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization = "none",
    streams: int = 10,
    rows: int = 512,
    double_quant: bool = False,
    backend: AnyBackend | None = None,
) -> ServedModel:
    backend = backend or PlainBackend(CPU, dtype)
    config, weights, _ = load_weights(
        directory, backend, quantization=quantization, double_quant=double_quant
    )
    decoder = Decoder(config, weights, backend)
    return ServedModel(decoder, decoder.new_kv(streams * BLOCKS_EACH, BLOCK), decoder.new_arena(rows))


def step(model: ServedModel, work: Sequence[tuple[Stream, int]]) -> None:
    """Compute the next ``count`` tokens of each stream in one step and keep all their logits."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    for stream, count in work:
        for position in range(stream.computed, stream.computed + count):
            ids.append(stream.tokens[position])
            positions.append(position)
            slots.append(stream.table[position // BLOCK] * BLOCK + position % BLOCK)
        stream.computed += count
        starts.append(len(ids))
    metadata = AttentionMetadata(
        ints(positions),
        ints(slots),
        ints(starts),
        ints([stream.computed for stream, _ in work]),
        ints([stream.table for stream, _ in work]),
    )
    adapters = StepAdapters.of_rows([stream.adapters for stream, _ in work])
    output = model(StepBatch(ints(ids), metadata, adapters, ints(range(len(ids)))))
    for (stream, _), first, last in zip(work, starts, starts[1:], strict=False):
        own = [output.others[place] for place in range(first, last) if place in output.others]
        stream.logits.append(torch.stack(own) if own else output.logits[first:last])
        stream.finite += output.finite[first:last].tolist()


def ints(values: Sequence[int] | Sequence[Sequence[int]]) -> Ints:
    return np.array(values, dtype=np.int32)


def all_logits(stream: Stream) -> Tensor:
    return torch.cat(stream.logits)


def random_adapter(
    config: ModelConfig,
    rank: int,
    seed: int,
    modules: Sequence[str] | None = None,
    scale: float = 0.3,
    *,
    outputs: bool = False,
) -> AdapterWeights:
    """Return factors that change the output visibly, for the given modules (None: all) of every layer.

    With ``outputs`` their modules' own outputs are scaled and shifted too.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = config.module_shapes()
    pairs, gains, offsets = {}, {}, {}
    for layer in range(config.num_layers):
        for module, path in config.module_paths(layer).items():
            if modules is None or module in modules:
                out, wide = shapes[module]
                a = torch.randn(rank, wide, generator=generator) * wide**-0.5
                pairs[path] = LoraPair(a, torch.randn(rank, out, generator=generator) * scale * rank**-0.5)
                if outputs:
                    gains[path] = torch.randn(out, generator=generator) * scale
                    offsets[path] = torch.randn(out, generator=generator) * scale
    return AdapterWeights(pairs, gains, offsets)


def place(model: ServedModel, adapters: Sequence[AdapterWeights], first_row: int = 5) -> list[AdapterRanges]:
    """Write adapters into the arena one after the other, with gaps, and return their ranges."""
    placed: list[AdapterRanges] = []
    next_row: dict[str, int] = {}
    for number, weights in enumerate(adapters):
        ranges: Mapping[str, RankRange] = {
            module: RankRange(next_row.get(module, first_row), rank)
            for module, rank in weights.rank_by_module().items()
        }
        model.arena.write(ranges, weights)
        for module, owned in ranges.items():
            next_row[module] = owned.start + owned.rank + number % 2
        placed.append(ranges)
    return placed
