"""How a checkpoint's linear layers are stored, and reading one of them whatever the format."""

from dataclasses import dataclass
from typing import Literal

import torch

from manylora.quant.awq import AwqTensor
from manylora.quant.bitsandbytes_format import read_nf4
from manylora.quant.checkpoint import Checkpoint
from manylora.quant.dense import DenseTensor
from manylora.quant.errors import CorruptCheckpoint, UnsupportedQuantization
from manylora.quant.gptq import GptqTensor
from manylora.quant.nf4 import Nf4Tensor
from manylora.quant.packed_format import read_awq, read_gptq

QuantizedTensor = Nf4Tensor | GptqTensor | AwqTensor | DenseTensor
DENSE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class StoredFormat:
    """How a checkpoint's linear layers are stored. A layer that was left alone is found dense by its name."""

    kind: Literal["dense", "nf4", "gptq", "awq"]
    bits: int = 16
    group_size: int = -1
    """GPTQ, AWQ: inputs that share a scale; −1: all of them."""
    zero_offset: int = 0
    """GPTQ: 1 where zero points are stored minus one."""
    reordered: bool = False
    """GPTQ: groups are not in the inputs' order (desc_act), so that g_idx must be there."""
    double_quant: bool = False
    """NF4: whether the scales are quantised too, as the config says."""

    def packs(self, checkpoint: Checkpoint, path: str) -> bool:
        """Whether module ``path`` is quantised in this checkpoint."""
        if self.kind == "dense":
            return False
        return f"{path}.{'weight.absmax' if self.kind == 'nf4' else 'qweight'}" in checkpoint.names()

    def read(self, checkpoint: Checkpoint, path: str) -> tuple[QuantizedTensor, set[str]]:
        """Read the linear layer at module ``path`` and return it with the tensor names that it took.

        Raises CorruptCheckpoint or UnsupportedQuantization naming the tensor.
        """
        matrix, names = self.show(checkpoint, path)
        return DenseTensor(matrix.weight.clone()) if isinstance(matrix, DenseTensor) else matrix, names

    def show(self, checkpoint: Checkpoint, path: str) -> tuple[QuantizedTensor, set[str]]:
        """Return what ``read`` does; a layer that isn't quantised shows the file: see Checkpoint.show."""
        if self.packs(checkpoint, path):
            if self.kind == "nf4":
                return read_nf4(checkpoint, path)
            if self.kind == "awq":
                return read_awq(checkpoint, path, self.group_size)
            return read_gptq(checkpoint, path, self.bits, self.group_size, self.zero_offset, self.reordered)
        if f"{path}.weight" not in checkpoint.names():
            raise self._missing(checkpoint, path)
        return DenseTensor(show_dense(checkpoint, f"{path}.weight")), {f"{path}.weight"}

    def _missing(self, checkpoint: Checkpoint, path: str) -> CorruptCheckpoint:
        if self.kind in ("gptq", "awq"):
            wanted = f"tensors '{path}.qweight' and '{path}.weight' are both"
        else:
            wanted = f"tensor '{path}.weight' is"
        hint = (
            f"; there is {path}.qweight, but config.json has no quantization_config that says how to read it"
            if self.kind == "dense" and f"{path}.qweight" in checkpoint.names()
            else ""
        )
        return CorruptCheckpoint(f"{checkpoint.directory}: {wanted} missing{hint}")


def read_dense(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Read a tensor that isn't quantised. Raises UnsupportedQuantization if it isn't 16- or 32-bit floats."""
    return show_dense(checkpoint, name).clone()


def show_dense(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Return what ``read_dense`` does without a copy: see Checkpoint.show."""
    tensor = checkpoint.show(name)
    if tensor.dtype not in DENSE_DTYPES:
        raise UnsupportedQuantization(
            f"{name} is {tensor.dtype}; a weight that is not quantised in a served way is float16, bfloat16 or float32"
        )
    return tensor
