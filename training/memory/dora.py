"""What DoRA (2402.09353) takes beside LoRA, as peft computes it. Bytes.

Each adapted matrix W [m, n] makes ΔW = B(A(1)) out of an identity of n × n at each pass, and then the norm of W + s·ΔW,
in float32 whatever W is stored in. With dropout the base's product is made a second time, of the dropped-out input,
and autograd keeps the copy of W that it was made with: a whole 16-bit base, however few bits it is stored in, unless
checkpointing makes each layer's copies anew. Held against measured tensors in tests/training/memory/test_dora.py.
"""

from collections.abc import Sequence

from manylora.training.memory.adapted import Adapted
from manylora.training.memory.quantised import stored_kind
from manylora.training.memory.run_shape import DTYPES, RunShape
from manylora.training.memory.shape import ModelShape

FLOAT32 = 4
BACKWARD_MATRIX, BACKWARD_STREAM = 12, 12
"""For each value of the largest matrix, and with dropout for each token and value of the residual stream, what a
layer's backward pass needs beyond LoRA's. Measured."""
RESULT_WIDTH = {2: 10, 4: 8}
"""By the width of the run's values: for each token and value of the MLP's width, what a pass needs beyond LoRA's when
nothing is kept. Measured."""


def saved(run: RunShape, layer: Sequence[Adapted]) -> float:
    """Return the bytes for a token that a layer saves: the base's product and the factors', which are scaled."""
    return 2.0 * DTYPES[run.dtype] * sum(each.outputs for each in layer)


def kept_weights(model: ModelShape, run: RunShape, layer: Sequence[Adapted]) -> float:
    """Return the bytes of the copies of a layer's matrices that are kept for its backward pass."""
    if run.dropout == 0 or not _is_copied(model, run):
        return 0.0
    return float(DTYPES[run.dtype] * sum(each.inputs * each.outputs for each in layer))


def norm_bytes(model: ModelShape, run: RunShape, layer: Sequence[Adapted]) -> float:
    """Return the bytes alive while a layer's largest norm is made in training, or the ΔW before it."""
    value = DTYPES[run.dtype]

    def needed(each: Adapted) -> float:
        identity, matrix = each.inputs**2, each.inputs * each.outputs
        cast = value * (identity + matrix) if value < FLOAT32 else FLOAT32 * matrix
        # Autograd holds the identity, as it was multiplied, for as long as it holds ΔW.
        return max(FLOAT32 * identity + cast, value * identity + _norm(model, run, matrix))

    return float(max(map(needed, layer), default=0.0))


def backward_bytes(model: ModelShape, run: RunShape, layer: Sequence[Adapted]) -> float:
    """Return the bytes that a layer's backward pass needs beyond LoRA's, which is the MLP's; none if that has none."""
    if all(model.intermediate_size not in (each.inputs, each.outputs) for each in layer):
        return 0.0
    product = BACKWARD_STREAM * run.tokens * model.hidden_size if run.dropout else 0.0
    return BACKWARD_MATRIX * _largest(layer) + product


def forward_bytes(model: ModelShape, run: RunShape, layer: Sequence[Adapted]) -> float:
    """Return the bytes that a layer's pass needs beyond LoRA's when nothing is kept for a backward one."""
    matrix = _largest(layer)
    product = (
        _held(model, run) * matrix + RESULT_WIDTH[DTYPES[run.dtype]] * run.tokens * model.intermediate_size
    )
    identity = FLOAT32 * max((each.inputs**2 for each in layer), default=0)
    return float(max(product, _norm(model, run, matrix), identity))


def _norm(model: ModelShape, run: RunShape, matrix: int) -> float:
    """Return the bytes of W and ΔW, s·ΔW, and their sum."""
    return (_held(model, run) + 2 * FLOAT32) * matrix


def _held(model: ModelShape, run: RunShape) -> int:
    """Return the bytes of a matrix's value that are there until its product is made: ΔW, and W where it is copied."""
    return FLOAT32 * (2 if _is_copied(model, run) else 1)


def _is_copied(model: ModelShape, run: RunShape) -> bool:
    return DTYPES[run.dtype] < FLOAT32 or stored_kind(model, run.method) is not None


def _largest(layer: Sequence[Adapted]) -> int:
    return max((each.inputs * each.outputs for each in layer), default=0)
