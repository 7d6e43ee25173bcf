"""The structures of native/abi.h for ctypes. Pointers are addresses; what they point to is said there.

Whoever fills one keeps what it points to alive: a structure here holds numbers only.
"""

import ctypes
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any, TypeAlias

VERSION = 8
"""ML_ABI: a library with another one isn't loaded."""
BLOCK = 32
MODULES = 7
TABLE4, INT8, BF16, SPLIT8 = 0, 1, 2, 3
ACTIVATIONS_INT8, ACTIVATIONS_BF16 = 0, 1
KV_BF16, KV_INT8 = 0, 1
TERM_GAIN, TERM_OFFSET = 0, 1


class Matrix(Structure):
    """ml_matrix."""

    _fields_ = (
        ("kind", c_int32),
        ("out", c_int32),
        ("in", c_int32),
        ("blocks", c_int32),
        ("padded_in", c_int32),
        ("group", c_int32),
        ("gain", c_float),
        ("activations", c_int32),
        ("table", c_void_p),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("sums", c_void_p),
        ("zeros", c_void_p),
        ("order", c_void_p),
        ("bias", c_void_p),
        ("values", c_void_p),
    )


class Source(Structure):
    """ml_source."""

    _fields_ = (
        ("form", c_int32),
        ("out", c_int32),
        ("in", c_int32),
        ("bits", c_int32),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("zeros", c_void_p),
        ("groups", c_void_p),
        ("of_output", c_int64),
        ("of_group", c_int64),
        ("scaled", c_float),
        ("reserved", c_int32),
    )


class Encoding(Structure):
    """ml_encoding."""

    _fields_ = (
        ("type", c_int32),
        ("block", c_int32),
        ("rows", c_int64),
        ("in", c_int64),
        ("weights", c_void_p),
        ("between", c_void_p),
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("most", c_int32),
        ("reserved", c_int32),
    )


class Layer(Structure):
    """ml_layer."""

    _fields_ = (
        ("attn_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("module", Matrix * MODULES),
        ("window", c_int32),
        ("reserved", c_int32),
    )


class Model(Structure):
    """ml_model."""

    _fields_ = (
        ("layers", c_int32),
        ("hidden", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("intermediate", c_int32),
        ("vocab", c_int32),
        ("positions", c_int32),
        ("eps", c_float),
        ("reserved", c_int32),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("layer", c_void_p),
        ("embedding", c_void_p),
        ("final_norm", c_void_p),
        ("head", c_void_p),
    )


class KV(Structure):
    """ml_kv."""

    _fields_ = (("data", c_void_p), ("slots", c_int64), ("block_size", c_int32), ("form", c_int32))


class Pair(Structure):
    """ml_pair."""

    _fields_ = (("a", c_void_p), ("b", c_void_p), ("layer", c_int32), ("layers", c_int32))


class Arena(Structure):
    """ml_arena."""

    _fields_ = (("pair", c_void_p),)


class Job(Structure):
    """ml_job."""

    _fields_ = (
        ("start", c_int32),
        ("rank", c_int32),
        ("count", c_int32),
        ("others", c_int32),
        ("tokens", c_void_p),
        ("weights", c_void_p),
        ("places", c_void_p),
    )


class Term(Structure):
    """ml_term."""

    _fields_ = (
        ("token", c_int32),
        ("start", c_int32),
        ("rank", c_int32),
        ("row", c_int32),
        ("kind", c_int32),
        ("weight", c_float),
    )


class Jobs(Structure):
    """ml_jobs."""

    _fields_ = (
        ("count", c_int32),
        ("width", c_int32),
        ("job", c_void_p),
        ("terms", c_int32),
        ("reserved", c_int32),
        ("term", c_void_p),
    )


class Step(Structure):
    """ml_step."""

    _fields_ = (
        ("tokens", c_int32),
        ("sequences", c_int32),
        ("table_width", c_int32),
        ("reserved", c_int32),
        ("ids", c_void_p),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("query_start", c_void_p),
        ("context_lens", c_void_p),
        ("block_tables", c_void_p),
        ("finite", c_void_p),
        ("given", c_void_p),
        ("jobs", Jobs * MODULES),
    )


class Call(Structure):
    """ml_call."""

    _fields_ = (
        ("model", c_void_p),
        ("kv", c_void_p),
        ("arena", c_void_p),
        ("step", c_void_p),
        ("layer", c_int32),
        ("reserved", c_int32),
        ("x", c_void_p),
        ("qkv", c_void_p),
        ("o", c_void_p),
        ("h", c_void_p),
    )


class Sampling(Structure):
    """ml_sampling."""

    _fields_ = (
        ("rows", c_int32),
        ("vocab", c_int32),
        ("top", c_int32),
        ("reserved", c_int32),
        ("logits", c_void_p),
        ("places", c_void_p),
        ("inverse_temperature", c_void_p),
        ("top_k", c_void_p),
        ("top_p", c_void_p),
        ("min_p", c_void_p),
        ("seed", c_void_p),
        ("choice", c_void_p),
        ("position", c_void_p),
        ("told", c_void_p),
        ("ids", c_void_p),
        ("logprobs", c_void_p),
        ("top_ids", c_void_p),
        ("top_logprobs", c_void_p),
        ("masks", c_void_p),
    )


class RunCall(Structure):
    """ml_run_call."""

    _fields_ = (
        ("call", c_void_p),
        ("rows", c_void_p),
        ("count", c_int64),
        ("hidden", c_void_p),
        ("logits", c_void_p),
        ("sampling", c_void_p),
        ("seconds", c_void_p),
        ("wake", c_int32),
        ("strange", c_int32),
        ("searched", c_int32),
        ("reserved", c_int32),
    )


STRUCTURES: dict[str, type[Structure]] = {
    "ml_matrix": Matrix,
    "ml_source": Source,
    "ml_encoding": Encoding,
    "ml_layer": Layer,
    "ml_model": Model,
    "ml_kv": KV,
    "ml_pair": Pair,
    "ml_arena": Arena,
    "ml_job": Job,
    "ml_term": Term,
    "ml_jobs": Jobs,
    "ml_step": Step,
    "ml_call": Call,
    "ml_sampling": Sampling,
    "ml_run_call": RunCall,
}


class Export(Structure):
    """ml_export of native/dispatch.h."""

    _fields_ = (("name", ctypes.c_char_p), ("call", c_void_p))


class LevelTable(Structure):
    """ml_level of native/dispatch.h."""

    _fields_ = (("name", ctypes.c_char_p), ("exports", ctypes.POINTER(Export)))


class Layout(Structure):
    """ml_layout of native/dispatch.h."""

    _fields_ = (("name", ctypes.c_char_p), ("bytes", c_int64))


def layouts() -> dict[str, int]:
    """Return what native/layouts.h must say of the structures here: sizes in bytes and fields' offsets by name."""
    said = {}
    for name, structure in STRUCTURES.items():
        said[name] = ctypes.sizeof(structure)
        for field in structure._fields_:
            said[f"{name}.{field[0]}"] = getattr(structure, field[0]).offset
    return said


Signature: TypeAlias = (
    "tuple[type[ctypes._SimpleCData[Any]] | None, tuple[type[ctypes._SimpleCData[Any]], ...]]"
)
SIGNATURES: dict[str, Signature] = {
    # What a level exports: what it returns, and what it takes after the pool. One line each, in the order of table.h.
    "layout": (c_int32, ()),
    "pack": (c_int32, (c_void_p, c_void_p)),
    "encode_nf4": (c_int32, (c_void_p,)),
    "encode_int8": (c_int32, (c_void_p,)),
    "linear": (c_int32, (c_void_p, c_void_p, c_int64, c_void_p)),
    "search": (c_int32, (c_void_p, c_void_p, c_int64, c_void_p, c_void_p)),
    "embedding": (None, (c_void_p, c_void_p, c_int64, c_void_p)),
    "matrix_rows": (None, (c_void_p, c_int64, c_int64, c_void_p)),
    "multiply_rows": (None, (c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p)),
    "read_words": (c_int64, (c_void_p, c_int64)),
    "dot_words": (c_int64, (c_int64,)),
    "rms_norm_rows": (None, (c_void_p, c_void_p, c_float, c_int64, c_int32, c_void_p)),
    "silu_mul_rows": (None, (c_void_p, c_void_p, c_int64, c_int32, c_void_p)),
    "rope_rows": (None, (c_void_p,)),
    "attention_rows": (None, (c_void_p,)),
    "lora_rows": (None, (c_int32, c_void_p, c_void_p, c_void_p, c_int32, *[c_void_p] * 3)),
    "step": (c_int32, (c_int32, c_void_p)),
    "hidden": (None, (c_void_p, c_void_p, c_void_p, c_int64, c_void_p)),
    "sample": (c_int32, (c_void_p,)),
    "report": (c_int32, (c_void_p,)),
    "run": (c_int32, (c_void_p,)),
}
