"""Bits of a stored weight, and the scratch that unpacking one matrix takes, by format."""

from manylora.quant.nf4 import DOUBLE_QUANT
from manylora.training.memory.shape import ModelShape

_NF4_BITS = {False: 4 + 32 / 64, True: 4 + 8 / 64 + 32 / (64 * 256)}
"""A code of 4 bits, and for 64 of them a float32 absmax: 4.5. With double quantisation an 8-bit absmax, and a float32
for 256 of those (QLoRA, 2305.14314, section 3): 4.127."""


def bits_per_weight(model: ModelShape, kind: str, *, double_quant: bool = DOUBLE_QUANT) -> float:
    """Return the bits that a matrix's value takes in nf4, gptq or awq.

    GPTQ and AWQ hold a float16 scale and a packed zero for every group of inputs; GPTQ also which group an input is
    in, 32 bits shared by a column of outputs, which is next to nothing.
    """
    if kind == "nf4":
        return _NF4_BITS[model.double_quant if model.quantization == "nf4" else double_quant]
    return model.bits + (16 + model.bits) / model.group_size


def stored_kind(model: ModelShape, method: str) -> str | None:
    """Return the 4-bit format that the base is held in; None for 16 bits. What is stored in 4 bits stays so."""
    return model.quantization or ("nf4" if method == "qlora" else None)


def scratch_bytes(model: ModelShape, kind: str, value_bytes: int) -> float:
    """Return the bytes alive while one matrix, the largest, is dequantised.

    NF4: the matrix in the run's dtype. GPTQ: its codes as bytes, and three float32 matrices of codes, zeros and their
    difference, before the cast; AWQ, whose zeros are broadcast, without one of them.
    """
    largest = max(inputs * outputs for _, inputs, outputs in model.matrices())
    return float(largest * {"nf4": value_bytes, "gptq": 13, "awq": 9}[kind])
