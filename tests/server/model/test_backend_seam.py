"""The decoder runs on whatever is a Backend: it looks into nothing that one makes."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from manylora.server.kernels.backend import AnyBackend, compose
from manylora.server.kernels.choose import sound_kernels
from manylora.server.kernels.composed import collect_composed, launch_composed
from manylora.server.kernels.cpu.backend import CpuBackend
from manylora.server.kernels.cpu.library import Unavailable
from manylora.server.kernels.output import StepOutput
from manylora.server.kernels.plain import PlainBackend
from manylora.server.kernels.step import AttentionMetadata, Ints, StepAdapters, StepBatch
from manylora.server.model.decoder import Decoder
from manylora.server.model.loader import load_weights
from manylora.server.model.served import ServedModel
from tests.server.model.models import save_model
from tests.server.model.steps import BLOCK, CPU, Stream, all_logits, load, place, random_adapter, step

CALLS = ["begin_step", "launch", "forward", "hidden", "logits", "answer", "finite", "collect"]


@dataclass
class Boxed:
    """Something that only the backend which made it can open."""

    inside: Any
    nbytes: int = 0


class BoxingBackend:
    """Plain torch, all of whose weights, caches and plans are in boxes, and whose forward is one call."""

    def __init__(self) -> None:
        self._plain = PlainBackend(CPU, torch.float32)
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._plain, name)

    def prepare_embedding(self, matrix: Tensor, *, tied: bool) -> Boxed:
        return Boxed(self._plain.prepare_embedding(matrix, tied=tied))

    def tie_head(self, embedding: Boxed) -> Any:
        return self._plain.tie_head(embedding.inside)

    def assemble(self, weights: Any) -> Boxed:
        return Boxed(replace(weights, embedding=weights.embedding.inside))

    def begin_step(self, model: Boxed, batch: Any, kv: Any, arena: Any) -> Boxed:
        self.calls.append("begin_step")
        return Boxed(self._plain.begin_step(model.inside, batch, kv, arena))

    def forward(self, plan: Boxed) -> Tensor:
        self.calls.append("forward")
        return compose(self._plain, plan.inside, plan.inside.weights.shape.num_layers)

    def hidden(self, plan: Boxed, x: Tensor, rows: Ints) -> Tensor:
        self.calls.append("hidden")
        return self._plain.hidden(plan.inside, x, rows)

    def logits(self, plan: Boxed, hidden: Tensor, count: int) -> Tensor:
        self.calls.append("logits")
        return self._plain.logits(plan.inside, hidden, count)

    def answer(self, plan: Boxed, rows: Ints, hidden: Tensor, logits: Tensor) -> Mapping[int, Tensor]:
        self.calls.append("answer")
        return self._plain.answer(plan.inside, rows, hidden, logits)

    def launch(self, plan: Boxed, rows: Ints, columns: None) -> Boxed:
        self.calls.append("launch")
        return Boxed(launch_composed(cast(Any, self), plan, rows, plan.inside.batch.state_rows))

    def collect(self, launched: Boxed, wake: int = -1) -> StepOutput:
        self.calls.append("collect")
        return collect_composed(launched.inside)

    def finite(self, plan: Boxed, x: Tensor) -> Tensor:
        self.calls.append("finite")
        return self._plain.finite(plan.inside, x)


def answer(model: ServedModel) -> Tensor:
    [ranges] = place(model, [random_adapter(model.decoder.config, 8, 1)])
    stream = Stream(0, list(range(40)), ((ranges, 0.5),))
    step(model, [(stream, 30)])
    step(model, [(stream, 10)])
    return all_logits(stream)


def test_a_decoder_runs_on_a_backend_with_layouts_of_its_own(tmp_path: Path) -> None:
    save_model("qwen2", tmp_path)
    boxing = BoxingBackend()
    backend: AnyBackend = boxing  # type: ignore[assignment]  # what it delegates mypy doesn't see
    config, weights, _ = load_weights(tmp_path, backend, quantization="none")
    decoder = Decoder(config, weights, backend)
    model = ServedModel(decoder, decoder.new_kv(40, 16), decoder.new_arena(64))
    assert torch.equal(answer(model), answer(load(tmp_path)))
    assert boxing.calls == CALLS * 2


def test_what_another_backend_made_is_refused(tmp_path: Path) -> None:
    save_model("qwen2", tmp_path)
    model, foreign = load(tmp_path), cast(Any, Boxed(None))
    weights = model.decoder.weights
    layers = tuple(replace(layer, o=foreign) for layer in weights.layers)
    for wrong in (
        replace(weights, embedding=foreign),
        replace(weights, head=foreign),
        replace(weights, layers=layers),
    ):
        decoder = Decoder(model.decoder.config, wrong, model.decoder.backend)
        with pytest.raises(TypeError, match="a Boxed was made by another backend"):
            answer(ServedModel(decoder, model.kv, model.arena))


def states_of(model: ServedModel, tokens: list[int], chunks: list[int]) -> Tensor:
    """The last hidden states of all tokens, computed in chunks of these lengths, with the last one's logits."""
    [ranges] = place(model, [random_adapter(model.decoder.config, 8, 1)])
    found, start = [], 0
    for length in chunks:
        attention = AttentionMetadata.of_rows([start], [length], [[3, 1, 2]], BLOCK)
        ids = np.array(tokens[start : start + length], dtype=np.int32)
        every = np.arange(length, dtype=np.int32)
        adapters = StepAdapters.of_rows([((ranges, 0.5),)])
        output = model.collect(model.launch(StepBatch(ids, attention, adapters, every[-1:], every), None))
        assert output.states is not None
        assert (output.states.dtype, output.logits.shape[0]) == (torch.float32, 1)
        found.append(output.states.clone())
        start += length
    return torch.cat(found)


def test_states_are_told_beside_logits_and_a_native_step_tells_them_too(tmp_path: Path) -> None:
    save_model("qwen2", tmp_path)
    tokens = [7 * each % 300 for each in range(40)]
    plain = states_of(load(tmp_path), tokens, [40])
    kernels = sound_kernels()
    if isinstance(kernels, Unavailable):
        pytest.skip(kernels.reason)
    native = [
        states_of(load(tmp_path, backend=CpuBackend(kernels, torch.float32)), tokens, chunks)
        for chunks in ([40], [1, 16, 20, 3])
    ]
    assert torch.equal(*native), "states depend on the chunks"
    assert torch.cosine_similarity(plain, native[0], dim=-1).min() > 0.99


def test_who_wants_no_states_is_told_none(tmp_path: Path) -> None:
    save_model("qwen2", tmp_path)
    attention = AttentionMetadata.of_rows([0], [3], [[1]], BLOCK)
    ids = np.array([1, 2, 3], dtype=np.int32)
    model = load(tmp_path)
    batch = StepBatch(ids, attention, StepAdapters.of_rows([()]), ids[:1])
    assert model.collect(model.launch(batch, None)).states is None


def test_a_native_step_wakes_a_listener_once_it_needs_the_interpreter_no_more(tmp_path: Path) -> None:
    kernels = sound_kernels()
    if isinstance(kernels, Unavailable):
        pytest.skip(kernels.reason)
    save_model("qwen2", tmp_path)
    model = load(tmp_path, backend=CpuBackend(kernels, torch.float32))
    attention = AttentionMetadata.of_rows([0], [3], [[1]], BLOCK)
    ids = np.array([1, 2, 3], dtype=np.int32)
    batch = StepBatch(ids, attention, StepAdapters.of_rows([()]), ids[:1])
    ends = os.pipe()
    try:
        os.set_blocking(ends[0], False)
        model.collect(model.launch(batch, None))
        with pytest.raises(BlockingIOError):
            os.read(ends[0], 9)
        model.collect(model.launch(batch, None), ends[1])
        assert len(os.read(ends[0], 9)) == 1
    finally:
        for end in ends:
            os.close(end)
