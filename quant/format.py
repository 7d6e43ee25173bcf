"""Which 4-bit format a checkpoint is in, by config.json's ``quantization_config``, and how to read it.

What can't be served is refused here, at start, by its name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from quant.awq import AwqTensor
from quant.bitsandbytes_format import read_nf4
from quant.checkpoint import Checkpoint
from quant.dense import DenseTensor
from quant.errors import CorruptCheckpoint, UnsupportedQuantization
from quant.gptq import GptqTensor
from quant.nf4 import Nf4Tensor

QuantizedTensor = Nf4Tensor | GptqTensor | AwqTensor | DenseTensor
GPTQ_BITS = (4, 8)
SERVED = "served are 16-bit weights, bitsandbytes NF4, GPTQ with 4 or 8 bits, and AWQ (GEMM) with 4 bits"


@dataclass(frozen=True, slots=True)
class StoredFormat:
    """How a checkpoint's linear layers are stored."""

    kind: Literal["dense", "nf4", "gptq", "awq"]
    bits: int = 16
    zero_offset: int = 0
    """GPTQ: 1 where zero points are stored minus one."""

    def read(self, checkpoint: Checkpoint, path: str) -> tuple[QuantizedTensor, set[str]]:
        """Read the linear layer at module ``path`` and return it with the tensor names that it took."""
        names = checkpoint.names()
        if self.kind == "nf4" and f"{path}.weight.absmax" in names:
            return read_nf4(checkpoint, path)
        if self.kind == "gptq" and f"{path}.qweight" in names:
            return self._read_gptq(checkpoint, path)
        if self.kind == "awq" and f"{path}.qweight" in names:
            tensors, taken = _read_all(checkpoint, path, ("qweight", "qzeros", "scales"))
            return AwqTensor(tensors["qweight"], tensors["qzeros"], tensors["scales"]), taken
        name = f"{path}.weight"
        return DenseTensor(checkpoint.read(name)), {name}

    def _read_gptq(self, checkpoint: Checkpoint, path: str) -> tuple[GptqTensor, set[str]]:
        tensors, taken = _read_all(checkpoint, path, ("qweight", "qzeros", "scales"))
        wide = tensors["qweight"].shape[0] * 32 // self.bits
        if f"{path}.g_idx" in checkpoint.names():
            more, also = _read_all(checkpoint, path, ("g_idx",))
            g_idx, taken = more["g_idx"], taken | also
        else:
            g_idx = torch.arange(wide) // (wide // tensors["scales"].shape[0])
        if int(g_idx.max()) >= tensors["scales"].shape[0]:
            raise CorruptCheckpoint(f"{path}.g_idx names a group that {path}.scales doesn't have")
        gptq = GptqTensor(
            tensors["qweight"], tensors["qzeros"], tensors["scales"], g_idx, self.bits, self.zero_offset
        )
        return gptq, taken


def stored_format(config: Mapping[str, object]) -> StoredFormat:
    """Tell the format from a config.json. Raises UnsupportedQuantization naming what isn't served."""
    section = config.get("quantization_config")
    if not isinstance(section, Mapping):
        return StoredFormat("dense")
    method = section.get("quant_method")
    if method == "bitsandbytes" or (method is None and section.get("load_in_4bit")):
        return _bitsandbytes(section)
    if method == "gptq":
        return _gptq(section)
    if method == "awq":
        return _awq(section)
    raise UnsupportedQuantization(f"quantization {method!r} is not served; {SERVED}")


def _bitsandbytes(section: Mapping[str, object]) -> StoredFormat:
    if section.get("load_in_8bit"):
        raise UnsupportedQuantization(f"bitsandbytes LLM.int8() is not served; {SERVED}")
    kind = section.get("bnb_4bit_quant_type", "fp4")
    if kind != "nf4":
        raise UnsupportedQuantization(f"bitsandbytes {kind} is not served; {SERVED}")
    return StoredFormat("nf4", 4)


def _gptq(section: Mapping[str, object]) -> StoredFormat:
    bits = section.get("bits")
    if bits not in GPTQ_BITS:
        raise UnsupportedQuantization(f"GPTQ with {bits} bits is not served; {SERVED}")
    dynamic = section.get("dynamic")
    if isinstance(dynamic, Mapping) and dynamic:
        raise UnsupportedQuantization(
            f"GPTQ with bits of its own for {next(iter(dynamic))!r} is not served; {SERVED}"
        )
    version = section.get("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise UnsupportedQuantization(
            f"GPTQ checkpoint_format {version!r} is not served; gptq and gptq_v2 are"
        )
    return StoredFormat("gptq", 4 if bits == GPTQ_BITS[0] else 8, 1 if version == "gptq" else 0)


def _awq(section: Mapping[str, object]) -> StoredFormat:
    bits, version = section.get("bits", section.get("w_bit")), str(section.get("version", "gemm")).lower()
    if bits != 4:
        raise UnsupportedQuantization(f"AWQ with {bits} bits is not served; {SERVED}")
    if version != "gemm":
        raise UnsupportedQuantization(f"AWQ version {version!r} is not served; {SERVED}")
    return StoredFormat("awq", 4)


def _read_all(
    checkpoint: Checkpoint, path: str, suffixes: tuple[str, ...]
) -> tuple[dict[str, torch.Tensor], set[str]]:
    tensors = {suffix: checkpoint.read(f"{path}.{suffix}") for suffix in suffixes}
    return tensors, {f"{path}.{suffix}" for suffix in suffixes}
