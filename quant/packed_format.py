"""GPTQ and AWQ matrices from a checkpoint: read, and held against each other's shapes before anything uses them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from manylora.quant.awq import AwqTensor
from manylora.quant.checkpoint import Checkpoint
from manylora.quant.errors import CorruptCheckpoint
from manylora.quant.gptq import GptqTensor

PACKED = ("qweight", "qzeros", "scales")
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def read_gptq(
    checkpoint: Checkpoint, path: str, bits: int, group_size: int, zero_offset: int, reordered: bool
) -> tuple[GptqTensor, set[str]]:
    """Read the GPTQ matrix of module ``path`` and return it with the tensor names that it took.

    ``reordered``: g_idx says which group an input is in, and must be there. Else it may be, and if not, groups
    are in the inputs' order. Raises CorruptCheckpoint naming the tensor.
    """
    has_index = f"{path}.g_idx" in checkpoint.names()
    if reordered and not has_index:
        raise CorruptCheckpoint(f"{checkpoint.directory}: '{path}.g_idx' is missing, which desc_act needs")
    tensors, taken = _read_all(checkpoint, path, (*PACKED, "g_idx") if has_index else PACKED)
    per_word = 32 // bits
    words, out = _matrix(path, "qweight", tensors)
    wide = words * per_word
    size = wide if group_size == -1 else group_size
    groups = -(-wide // size)
    _expect(path, "qzeros", tensors, (torch.int32,), (groups, out // per_word))
    _expect(path, "scales", tensors, SCALE_DTYPES, (groups, out))
    _check_finite(path, tensors)
    g_idx = tensors.get("g_idx", torch.arange(wide, dtype=torch.int32) // size)
    if has_index:
        _expect(path, "g_idx", tensors, (torch.int32, torch.int64), (wide,))
        if int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
            raise CorruptCheckpoint(f"{path}.g_idx names a group that {path}.scales doesn't have")
    gptq = GptqTensor(tensors["qweight"], tensors["qzeros"], tensors["scales"], g_idx, bits, zero_offset)
    return gptq, taken


def read_awq(checkpoint: Checkpoint, path: str, group_size: int) -> tuple[AwqTensor, set[str]]:
    """Read the AWQ matrix of module ``path`` and return it with the tensor names that it took.

    Raises CorruptCheckpoint naming the tensor.
    """
    tensors, taken = _read_all(checkpoint, path, PACKED)
    wide, words = _matrix(path, "qweight", tensors)
    size = wide if group_size == -1 else group_size
    if wide % size:
        raise CorruptCheckpoint(f"{path}.qweight has {wide} inputs, which groups of {size} don't divide")
    _expect(path, "qzeros", tensors, (torch.int32,), (wide // size, words))
    _expect(path, "scales", tensors, SCALE_DTYPES, (wide // size, words * 8))
    _check_finite(path, tensors)
    return AwqTensor(*(tensors[name] for name in PACKED)), taken


def _read_all(
    checkpoint: Checkpoint, path: str, suffixes: tuple[str, ...]
) -> tuple[dict[str, Tensor], set[str]]:
    return (
        {suffix: checkpoint.read(f"{path}.{suffix}") for suffix in suffixes},
        {f"{path}.{suffix}" for suffix in suffixes},
    )


def _matrix(path: str, suffix: str, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    tensor = tensors[suffix]
    if tensor.dtype != torch.int32 or tensor.dim() != 2:
        raise CorruptCheckpoint(
            f"{path}.{suffix} is {tensor.dtype} {list(tensor.shape)}, not a matrix of torch.int32"
        )
    return tensor.shape[0], tensor.shape[1]


def _expect(
    path: str,
    suffix: str,
    tensors: Mapping[str, Tensor],
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
) -> None:
    tensor = tensors[suffix]
    if tensor.dtype not in dtypes or tuple(tensor.shape) != shape:
        kinds = " or ".join(map(str, dtypes))
        raise CorruptCheckpoint(
            f"{path}.{suffix} is {tensor.dtype} {list(tensor.shape)}, but {path}.qweight and "
            f"quantization_config say {kinds} {list(shape)}"
        )


def _check_finite(path: str, tensors: Mapping[str, Tensor]) -> None:
    if not torch.isfinite(tensors["scales"]).all():
        raise CorruptCheckpoint(f"{path}.scales holds NaN or infinite values")
