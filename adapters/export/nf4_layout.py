"""A merged matrix in bitsandbytes' prequantised layout: which tensors there are, and their values.

quant/bitsandbytes_format.py reads what this writes. The state is JSON, padded with spaces to a fixed size, so that a
shard's header can be written before the values are known.
"""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from manylora.adapters.export.rows import Rows, chunks
from manylora.adapters.export.safetensors_writer import Entry
from manylora.quant.bitsandbytes_format import STATE
from manylora.quant.dynamic import quantize_dynamic
from manylora.quant.nf4 import BLOCKSIZE, NESTED_BLOCKSIZE, NF4_CODE, NestedScales, Nf4Tensor, quantize_nf4

_STATE_BYTES = 256


def nf4_entries(name: str, shape: tuple[int, ...], *, double_quant: bool) -> list[Entry]:
    """Return the tensors that stand for the matrix ``name``, a parameter ending in ".weight"."""
    count = shape[0] * shape[1]
    blocks = -(-count // BLOCKSIZE)
    path = name.removesuffix("weight")
    entries = [
        Entry(name, torch.uint8, (-(-count // 2), 1)),
        Entry(f"{name}.absmax", torch.uint8 if double_quant else torch.float32, (blocks,)),
        Entry(f"{name}.quant_map", torch.float32, (16,)),
        Entry(f"{path}{STATE}nf4", torch.uint8, (_STATE_BYTES,)),
    ]
    if double_quant:
        nested = -(-blocks // NESTED_BLOCKSIZE)
        entries += [
            Entry(f"{name}.nested_absmax", torch.float32, (nested,)),
            Entry(f"{name}.nested_quant_map", torch.float32, (256,)),
        ]
    return entries


def quantize_rows(source: Rows, dtype: torch.dtype, *, double_quant: bool) -> Nf4Tensor:
    """Quantise a matrix chunk by chunk, after rounding to ``dtype`` as transformers does.

    Raises ValueError for non-finite values.
    """
    parts = [quantize_nf4(source.rows(first, last).to(dtype)) for first, last in chunks(source.shape)]
    absmax = torch.cat([part.scales() for part in parts])
    shape = source.shape[0], source.shape[1]
    codes = torch.cat([part.codes for part in parts])
    if not double_quant:
        return Nf4Tensor(codes, absmax, shape)
    offset = absmax.mean()
    nested_codes, nested, code_map = quantize_dynamic(absmax - offset, NESTED_BLOCKSIZE)
    return Nf4Tensor(codes, NestedScales(nested_codes, nested, code_map, offset), shape)


def nf4_tensors(name: str, matrix: Nf4Tensor, dtype: torch.dtype) -> Mapping[str, Tensor]:
    """Return the values of the tensors that ``nf4_entries`` names."""
    path = name.removesuffix("weight")
    state: dict[str, object] = {
        "quant_type": "nf4",
        "blocksize": matrix.blocksize,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(matrix.shape),
    }
    tensors = {name: matrix.codes.view(-1, 1), f"{name}.quant_map": NF4_CODE}
    if isinstance(matrix.absmax, NestedScales):
        nested = matrix.absmax
        state |= {"nested_blocksize": nested.blocksize, "nested_dtype": "float32"}
        state["nested_offset"] = nested.offset.item()
        tensors[f"{name}.absmax"] = nested.codes
        tensors[f"{name}.nested_absmax"] = nested.absmax
        tensors[f"{name}.nested_quant_map"] = nested.code_map
    else:
        tensors[f"{name}.absmax"] = matrix.absmax
    padded = json.dumps(state).encode().ljust(_STATE_BYTES)
    tensors[f"{path}{STATE}nf4"] = torch.tensor(list(padded), dtype=torch.uint8)
    return tensors


def quantization_config(dtype: torch.dtype, *, double_quant: bool) -> dict[str, object]:
    """Return config.json's section for these tensors, as transformers writes it."""
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
