"""Small integers packed into int32 words, lowest bits first, as GPTQ and AWQ checkpoints hold them."""

import torch
from torch import Tensor


def unpack(words: Tensor, bits: int, dim: int) -> Tensor:
    """Spread each int32 of ``words`` into 32 / bits values along ``dim``; returns uint8, dim times as long."""
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    spread = words.unsqueeze(dim + 1) >> shifts.view(-1, *[1] * (words.dim() - dim - 1))
    return (spread & (1 << bits) - 1).to(torch.uint8).flatten(dim, dim + 1)


def pack(values: Tensor, bits: int, dim: int) -> Tensor:
    """Undo ``unpack``: values in [0, 2**bits) along ``dim``, whose length is a multiple of 32 / bits."""
    count = 32 // bits
    grouped = torch.unflatten(values.to(torch.int64), dim, (-1, count))
    shifts = torch.arange(0, 32, bits, device=values.device)
    words = (grouped << shifts.view(-1, *[1] * (values.dim() - dim - 1))).sum(dim + 1)
    # The top value may set the sign bit: wrap rather than overflow.
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
