"""From the tensors that an adapter's file has of one module to what a server adds: scales folded in, rounded once.

LoRA (2106.09685): y = W x + s·B A x. DoRA (2402.09353), as peft 0.21 computes it: each row of W + s·B A is scaled to a
trained length m, the bias stays as it is. With g = m / ‖row‖ that is y = g ⊙ W x + (g ⊙ s·B) A x. Biases: one of B is
scaled as B is, and one that takes the place of the base's shifts the output by what it differs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.adapters.errors import InvalidAdapter
from manylora.adapters.files import WEIGHTS_FILE
from manylora.adapters.finite import all_finite
from manylora.adapters.types import LoraPair, ServedBase

A, B, MAGNITUDE, B_BIAS = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "lora_B.bias"
BIAS, OTHER_BIAS = "base_layer.bias", "bias"
"""What peft's save_pretrained calls a module's tensors, after its path; the last is of one that has no factors."""


def tensor_name(path: str, part: str) -> str:
    """Return the name in the file of one of a module's tensors."""
    return f"base_model.model.{path}.{part}"


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor that can be computed with: one of 8 bits in float32, others as they are."""
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor


@dataclass(frozen=True, slots=True)
class TrainedModule:
    """What an adapter has of the module at ``path``; what is made of it raises InvalidAdapter, naming the tensor."""

    path: str
    a: Tensor
    """[rank, in]"""
    b: Tensor
    """[out, rank]"""
    scale: float
    """α/r or α/√r"""
    magnitude: Tensor | None = None
    """[out], of DoRA"""

    def row_scale(self, base: ServedBase) -> Tensor | None:
        """Return g, float32 [out]: what each row of W + s·B A is multiplied by; None without a magnitude."""
        if self.magnitude is None:
            return None
        for part, tensor in ((A, self.a), (B, self.b), (MAGNITUDE, self.magnitude)):
            self._check_values(tensor, part)
        norms = base.row_norms(self.path, self.a.float(), self.b.float() * self.scale)
        found: Tensor = self.magnitude.float() / norms
        if not all_finite(found):
            raise self._refused(
                "scales a row of the base that has no finite length, or none at all", MAGNITUDE
            )
        return found

    def pair(self, dtype: torch.dtype, row_scale: Tensor | None) -> LoraPair:
        """Return a [r, in] and b [r, out]; scales are applied in float32, before rounding to ``dtype``."""
        a = torch.empty(self.a.shape, dtype=dtype).copy_(self.a)
        if row_scale is None and self.b.dtype == dtype:
            # torch multiplies numbers of 16 bits by a float in float32 too.
            b = self.b.T.contiguous() * self.scale
        else:
            scaled = self.b.float() * self.scale
            if row_scale is not None:
                scaled *= row_scale[:, None]
            b = torch.empty(scaled.shape[::-1], dtype=dtype).copy_(scaled.T)
        for part, source, made in ((A, self.a, a), (B, self.b, b)):
            self._check_range(source, made, part)
        return LoraPair(a, b)

    def gain(self, dtype: torch.dtype, row_scale: Tensor) -> Tensor:
        """Return what is added to 1, float32 [out], finite in ``dtype`` too."""
        gain = row_scale - 1
        self._check_range(row_scale, gain.to(dtype), MAGNITUDE)
        return gain

    def _check_range(self, source: Tensor, made: Tensor, part: str) -> None:
        """Refuse what came out of ``source`` if it can't be served. What is finite came of finite numbers."""
        if not all_finite(made):
            self._check_values(source, part)
            raise self._refused(f"overflows {made.dtype} once scaled by {self.scale:g}", part)

    def _check_values(self, tensor: Tensor, part: str) -> None:
        if not all_finite(tensor):
            raise self._refused("holds NaN or Inf", part)

    def _refused(self, what: str, part: str) -> InvalidAdapter:
        return InvalidAdapter(what, file=WEIGHTS_FILE, tensor=tensor_name(self.path, part))


@dataclass(frozen=True, slots=True)
class TrainedBias:
    """What an adapter has of biases of the module at ``path``. Raises InvalidAdapter as TrainedModule does."""

    path: str
    of_b: Tensor | None
    """[out]: of B"""
    whole: Tensor | None
    """[out]: in the place of the base's"""
    scale: float = 1.0
    """Of B."""

    def offset(self, dtype: torch.dtype, base: ServedBase) -> Tensor | None:
        """Return what is added to the module's output, float32 [out], finite in ``dtype`` too; None: nothing."""
        total: Tensor | None = None
        if self.of_b is not None:
            total = self.of_b.float() * self.scale
        if self.whole is not None:
            other = self.whole.float() - base.bias(self.path)
            total = other if total is None else total + other
        if total is not None and not all_finite(total.to(dtype)):
            name = tensor_name(self.path, BIAS if self.of_b is None else B_BIAS)
            raise InvalidAdapter(f"holds NaN or Inf, or overflows {dtype}", file=WEIGHTS_FILE, tensor=name)
        return total
