"""What --eval_answers holds beside a run: the base once more, as the server has it, in the same process. In bytes.

The pools are those of manylora.served_generation. Linear layers are served in the form that they are trained in; all
else is in the dtype that the server computes in.
"""

import math

from manylora.training.memory.adapted import factor_values
from manylora.training.memory.quantised import bits_per_weight, stored_kind
from manylora.training.memory.run_shape import RunShape
from manylora.training.memory.shape import ModelShape

MOST_RUNNING = 32
MOST_KV_BYTES = 1 << 30
BLOCK = 16
STEP_TOKENS = 512
"""Tokens of one step of the engine."""
SERVER_LIBRARIES = 140 << 20
"""On a CPU: what the server's modules and threads take in a process that trains already. Measured, by
loadtest/checks/memory_long.py."""
CPU_NF4_BITS = 4 + 32 / 64
"""A code, and 16 bits each of a scale and a sum for 64 of them: as the server's native kernels on a CPU have them.
Without those it is 4.25, but embedding and head, which they hold in 8 bits, are as wide as is planned."""
STEP_BYTES = 10
"""For each value of the residual stream and of the MLP's width, of every token of a step."""
LOGIT_BYTES = 8
"""Of a row that samples: float32, and a copy."""


def served_bytes(model: ModelShape, run: RunShape) -> float:
    """Return what the served copy holds from the first evaluation to the end of the run. 0 without --eval_answers."""
    if not run.answer_tokens:
        return 0.0
    value = _value_bytes(run)
    weights = model.layer_parameters * _bits(model, run, value) / 8
    outside = SERVER_LIBRARIES if run.device == "cpu" else 0
    unquantised = float(value * (model.embedding_parameters + model.small_parameters))
    return weights + unquantised + _adapter_bytes(model, run, value) + _kv_bytes(model, run, value) + outside


def answering_bytes(model: ModelShape, run: RunShape) -> float:
    """Return what answering needs beside that, for as long as it lasts."""
    if not run.answer_tokens:
        return 0.0
    rows = min(MOST_RUNNING, run.answers)
    tokens = min(STEP_TOKENS, rows * run.answer_tokens)
    kind = stored_kind(model, run.method)
    matrix = 0 if kind is None else max(inputs * outputs for _, inputs, outputs in model.matrices())
    step = STEP_BYTES * tokens * (model.hidden_size + model.intermediate_size)
    return float(_value_bytes(run) * matrix + step + LOGIT_BYTES * rows * model.vocab_size)


def _bits(model: ModelShape, run: RunShape, value: int) -> float:
    """Return the bits of a weight: it is served in the form that it is trained in."""
    kind = stored_kind(model, run.method)
    if kind is None:
        return 8.0 * value
    if kind == "nf4" and run.device == "cpu" and value == 2:
        return CPU_NF4_BITS
    return bits_per_weight(model, kind, double_quant=run.double_quant)


def _adapter_bytes(model: ModelShape, run: RunShape, value: int) -> float:
    """Return the arena: for each rank row the inputs and outputs of every module that an adapter may target.

    On a CPU what is written to is resident, and the adapter's host copy lies beside it, in float32.
    """
    # The start is served with what was trained on top of it, at twice the rank.
    times = 2 if run.starts_from_base else 1
    if run.device == "cpu":
        return float(times * (value + 4) * factor_values(model, run))
    per_row = model.num_layers * sum(i + o for _, i, o in model.matrices())
    return float(times * max(run.rank, *(rank for _, rank in run.rank_pattern), 1) * value * per_row)


def _kv_bytes(model: ModelShape, run: RunShape, value: int) -> float:
    block = 2 * model.num_layers * BLOCK * model.kv_size * value
    blocks = math.ceil(run.answer_tokens / BLOCK) + 1
    sequences = max(1, min(MOST_RUNNING, MOST_KV_BYTES // (blocks * block)))
    # On a CPU a block is resident once it is written to.
    return float((min(sequences, run.answers) if run.device == "cpu" else sequences) * blocks * block)


def _value_bytes(run: RunShape) -> int:
    """Return the width of the server's dtype: bfloat16, but for processors that don't multiply it."""
    if run.device == "cuda":
        return 2
    import torch

    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return 2 if any(getattr(torch.cpu, probe, lambda: False)() for probe in probes) else 4
