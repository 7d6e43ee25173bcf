"""A step's ops one by one: what each must read and multiply at least, and how long it takes. Over all layers."""

import statistics
import time
from collections.abc import Mapping

import numpy as np
import torch

from manylora.loadtest.bench.limits import Work
from manylora.server.kernels.backend import AnyBackend
from manylora.server.kernels.step import StepBatch
from manylora.server.model.served import ServedModel

LINEAR_OPS = ("attn_in", "attn_out", "mlp_in", "mlp_out")
OPS = ("attn_in", "attend", "attn_out", "mlp_in", "mlp_out", "head")
MODULES: Mapping[str, tuple[str, ...]] = {
    "attn_in": ("q_proj", "k_proj", "v_proj"),
    "attn_out": ("o_proj",),
    "mlp_in": ("gate_proj", "up_proj"),
    "mlp_out": ("down_proj",),
}
HALF = 2
"""Bytes of a bfloat16: adapters."""
WARM_UP = 2


def op_work(model: ServedModel, step: StepBatch) -> dict[str, Work]:
    """Return each op's least work. Keys and values are read once a sequence, adapters once a step, weights once."""
    weights, config = model.decoder.weights, model.decoder.config
    tokens = len(step.token_ids)
    adapters = _adapters(model, step)
    found = {}
    for op, name in zip(LINEAR_OPS, ("qkv", "o", "gate_up", "down"), strict=True):
        linears = [getattr(layer, name) for layer in weights.layers]
        products = sum(linear.shape[0] * linear.shape[1] for linear in linears) * tokens
        found[op] = Work(sum(linear.nbytes for linear in linears), products) + adapters[op]
    attention, layers = step.attention, len(weights.layers)
    # A token attends to itself and what is before it; its heads share the keys of their group.
    seen = int((attention.positions.astype(np.int64) + 1).sum())
    slots = (model.kv.num_blocks + 1) * model.kv.block_size
    read = model.kv.nbytes * int(attention.context_lens.astype(np.int64).sum()) // slots
    found["attend"] = Work(read, real=2.0 * layers * seen * config.num_heads * config.head_dim)
    head, rows = weights.head, len(step.logits_rows)
    found["head"] = Work(head.nbytes, head.shape[0] * head.shape[1] * rows)
    return found


def _adapters(model: ServedModel, step: StepBatch) -> dict[str, Work]:
    """Return what adapters add to each linear op: A and B read once, each token's own ranks multiplied."""
    shapes, layers = model.decoder.config.module_shapes(), model.decoder.config.num_layers
    adapters, lengths = step.adapters, np.diff(step.attention.query_start)
    used: dict[int, int] = {}
    for row, length in enumerate(lengths.tolist()):
        for place in range(adapters.start[row], adapters.start[row + 1]):
            which = int(adapters.which[place])
            used[which] = used.get(which, 0) + length
    found = {}
    for op, modules in MODULES.items():
        work = Work(0)
        for which, tokens in used.items():
            ranges = adapters.ranges[which]
            for module in modules:
                if module in ranges:
                    factors = layers * ranges[module].rank * sum(shapes[module])
                    work += Work(HALF * factors, real=float(factors * tokens))
        found[op] = work
    return found


def op_seconds(model: ServedModel, step: StepBatch, repeats: int) -> dict[str, float]:
    """Return the median seconds of each op, all layers together."""
    backend: AnyBackend = model.decoder.backend
    assembled = backend.assemble(model.decoder.weights)
    layers = model.decoder.config.num_layers
    taken: dict[str, list[float]] = {op: [] for op in OPS}
    with torch.inference_mode():
        for number in range(repeats + WARM_UP):
            plan = backend.begin_step(assembled, step, model.kv, model.arena)
            clock = _Clock()
            x = backend.embed(plan)
            for layer in range(layers):
                clock.start()
                qkv = backend.attn_in(plan, layer, x)
                clock.lap("attn_in")
                o = backend.attend(plan, layer, qkv)
                clock.lap("attend")
                x = backend.attn_out(plan, layer, o, x)
                clock.lap("attn_out")
                h = backend.mlp_in(plan, layer, x)
                clock.lap("mlp_in")
                x = backend.mlp_out(plan, layer, h, x)
                clock.lap("mlp_out")
            hidden = backend.hidden(plan, x, step.logits_rows)
            clock.start()
            backend.logits(plan, hidden, len(step.logits_rows))
            clock.lap("head")
            if number >= WARM_UP:
                for op in OPS:
                    taken[op].append(clock.seconds[op])
    return {op: statistics.median(times) for op, times in taken.items()}


class _Clock:
    """Adds up laps by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._at = 0.0

    def start(self) -> None:
        self._at = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._at
        self._at = now
