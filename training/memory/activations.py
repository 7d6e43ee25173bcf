"""What one layer keeps for its backward pass, and what it needs while it runs. Bytes for one token.

Counted from what autograd saves in transformers' decoder layers with peft's LoRA around each matrix (float32 factors,
autocast to the run's dtype), and held against measured tensors in tests/training/memory/test_activations.py. The
matrices are frozen, so none of them saves its input; the factors beside them do.
"""

from collections.abc import Sequence

from manylora.training.memory import dora
from manylora.training.memory.adapted import Adapted
from manylora.training.memory.run_shape import DTYPES, RunShape
from manylora.training.memory.shape import ModelShape

_ATTENTION_IN = {"q_proj", "k_proj", "v_proj", "c_attn"}
_MLP_IN = {"gate_proj", "up_proj", "w1", "w2"}
_MLP_OUT = {"down_proj", "c_proj"}
FORWARD_BYTES = {2: (12, 8), 4: (16, 16)}
"""By the width of the run's values: measured, for each value of the residual stream, and of the MLP's width."""


def saved(model: ModelShape, run: RunShape, layer: Sequence[Adapted]) -> float:
    """Return the bytes that a layer with these adapted matrices saves for a token.

    In values: both norms their input in float32; each adapted matrix of n inputs its own dropped-out copy, the mask,
    and A's r outputs; attention q, k, v, its output and a float32 log-sum; SiLU its input, and the gate's product both
    factors (3 × MLP width).
    """
    value = DTYPES[run.dtype]
    norms = 2 * 4 * model.hidden_size
    if model.family == "qwen3":  # norms of each head's q and k
        norms += 4 * (model.query_size + model.kv_size)
    # A mask hides grouped heads from the fused kernels: k and v are repeated for every query head.
    kv = model.query_size if has_mask(run) else model.kv_size
    attention = value * (2 * model.query_size + 2 * kv) + 4 * model.num_heads
    mlp = 3 * value * model.intermediate_size
    return norms + attention + mlp + _adapters(model, run, layer)


def _adapters(model: ModelShape, run: RunShape, layer: Sequence[Adapted]) -> float:
    """Return what the LoRA branches of a layer save for a token."""
    value = DTYPES[run.dtype]
    factors = float(value * sum(each.rank for each in layer))
    if run.use_dora:
        factors += dora.saved(run, layer)
    if run.dropout == 0 and run.dtype == "fp32":
        # The branches of q, k and v, and of gate and up, keep the tensor that their matrix reads; o's is kept anyway.
        names = {each.name for each in layer}
        h, m = model.hidden_size, model.intermediate_size
        widths = ((_ATTENTION_IN, h), (_MLP_IN, h), (_MLP_OUT, m))
        return factors + value * sum(width for group, width in widths if names & group)
    inputs = sum(each.inputs for each in layer)
    # CUDA's fused dropout keeps a mask of bytes; the CPU's multiplies by float32 noise and keeps that.
    mask = 0 if run.dropout == 0 else 1 if run.device == "cuda" else 4
    return factors + (value + mask) * inputs


def working(model: ModelShape, run: RunShape) -> float:
    """Return the bytes for a token that a layer's pass needs beside what it saves.

    Gradients on their way through the MLP and the factors beside it, in float32 and in the run's dtype: measured, 10
    bytes for each value of the residual stream and of the MLP's width in mixed precision, 6 in float32.
    """
    return (6 if run.dtype == "fp32" else 10) * (model.hidden_size + model.intermediate_size)


def forward(model: ModelShape, run: RunShape) -> float:
    """Return the bytes for a token that a layer's pass needs when nothing is kept for a backward one."""
    stream, mlp = FORWARD_BYTES[DTYPES[run.dtype]]
    return float(stream * model.hidden_size + mlp * model.intermediate_size)


def has_mask(run: RunShape) -> bool:
    """Whether attention gets a mask: rows of different lengths, or several examples in a row."""
    return run.batch > 1 or run.packing
