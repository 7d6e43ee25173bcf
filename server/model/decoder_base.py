"""A decoder's linear layers, as adapters that are relative to them read them: rows' lengths (DoRA) and biases.

The weights are those that the backend multiplies by, however few bits they are held in, as peft does, which dequantises
a quantised layer for it. They are read a few rows at a time, beside the engine's steps.
"""

import torch
from torch import Tensor

from manylora.server.kernels.weights import LinearWeight
from manylora.server.model.config import FUSED
from manylora.server.model.decoder import Decoder


class DecoderBase:
    """See ServedBase."""

    def __init__(self, decoder: Decoder) -> None:
        self._backend = decoder.backend
        self._places: dict[str, tuple[LinearWeight, int, int]] = {}
        shape = decoder.weights.shape
        for layer, paths in zip(decoder.weights.layers, shape.paths, strict=True):
            for name, modules in FUSED.items():
                first = 0
                for module in modules:
                    last = first + shape.modules[module][0]
                    self._places[paths[module]] = getattr(layer, name), first, last
                    first = last

    @torch.inference_mode()
    def row_norms(self, path: str, a: Tensor, b: Tensor) -> Tensor:
        """See ServedBase."""
        weight, first, last = self._places[path]
        a, b = a.to(self._backend.device), b.to(self._backend.device)
        norms: list[Tensor] = []
        done = 0
        for piece in self._backend.rows(weight, first, last):
            changed = torch.addmm(piece, b[done : done + len(piece)], a)
            norms.append(torch.linalg.vector_norm(changed, dim=1))
            done += len(piece)
        return torch.cat(norms).cpu()

    def bias(self, path: str) -> Tensor:
        """See ServedBase."""
        weight, first, last = self._places[path]
        bias = self._backend.bias(weight)
        assert bias is not None, f"{path} has no bias"
        return bias[first:last].float().cpu()
