"""How the host holds adapters' weights beside a CUDA device: in pinned memory, from which copies don't wait."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from manylora.adapters.types import AdapterWeights, LoraPair

_ALIGNMENT = 256
"""Bytes at whose multiples tensors begin."""


def _page_locked(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def pinned(weights: AdapterWeights, allocate: Callable[[int], Tensor] = _page_locked) -> AdapterWeights:
    """Return the same weights with all pairs in one buffer, which ``allocate`` gives: uint8 of so many bytes.

    One, since pinning takes as long as copying some megabytes.
    """
    ends = 0
    places: dict[str, tuple[int, int]] = {}
    for path, pair in weights.pairs.items():
        second = ends + _aligned(pair.a.nbytes)
        places[path] = ends, second
        ends = second + _aligned(pair.b.nbytes)
    buffer = allocate(ends)
    pairs = {
        path: LoraPair(_put(buffer, places[path][0], pair.a), _put(buffer, places[path][1], pair.b))
        for path, pair in weights.pairs.items()
    }
    return replace(weights, pairs=pairs)


def _put(buffer: Tensor, start: int, tensor: Tensor) -> Tensor:
    held = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return held.copy_(tensor)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
