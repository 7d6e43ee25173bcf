"""GPTQ and AWQ matrices packed and unpacked number by number, from the formats' descriptions alone.

Nothing here uses quant/: this is what quant/ is held against, and what makes checkpoints for its tests.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Codes:
    """A quantised matrix before it is packed: w[i, o] = scales[g_idx[i], o] · (codes[i, o] − zeros[g_idx[i], o])."""

    codes: Ints
    zeros: Ints
    scales: Tensor
    g_idx: Ints
    bits: int

    def weight(self) -> Tensor:
        """Return float32 [out, in], one number at a time."""
        rows, columns = self.codes.shape
        scales = self.scales.float().numpy()
        out = np.zeros((columns, rows), dtype=np.float32)
        for i in range(rows):
            group = self.g_idx[i]
            for o in range(columns):
                out[o, i] = scales[group, o] * np.float32(self.codes[i, o] - self.zeros[group, o])
        return torch.from_numpy(out)


def random_codes(
    rows: int, columns: int, group_size: int, bits: int, *, sym: bool, desc_act: bool, seed: int = 0
) -> Codes:
    draw = np.random.default_rng(seed)
    size = rows if group_size == -1 else group_size
    groups = -(-rows // size)
    most = 2**bits
    zeros = np.full((groups, columns), most // 2) if sym else draw.integers(0, most, (groups, columns))
    g_idx = np.arange(rows) // size
    if desc_act:
        draw.shuffle(g_idx)
    scales = torch.from_numpy(draw.uniform(0.001, 0.1, (groups, columns)).astype(np.float32)).half()
    return Codes(draw.integers(0, most, (rows, columns)), zeros, scales, g_idx, bits)


def nearest_codes(weight: Tensor, group_size: int, bits: int, desc_act: bool = False) -> Codes:
    """Round a matrix [out, in] to codes, asymmetric; with ``desc_act`` the groups are of scattered inputs."""
    columns, rows = weight.shape
    size = rows if group_size == -1 else group_size
    g_idx = np.arange(rows) // size
    if desc_act:
        np.random.default_rng(rows + columns).shuffle(g_idx)
    values = weight.float().numpy().T
    most = 2**bits - 1
    groups = int(g_idx.max()) + 1
    scales = np.zeros((groups, columns), dtype=np.float16)
    zeros = np.zeros((groups, columns), dtype=np.int64)
    codes = np.zeros((rows, columns), dtype=np.int64)
    for group in range(groups):
        part = values[g_idx == group]
        low, high = np.minimum(part.min(0), 0), np.maximum(part.max(0), 0)
        scales[group] = (high - low) / most
        wide = scales[group].astype(np.float32)
        zeros[group] = np.clip(np.rint(-low / wide), 0, most)
        codes[g_idx == group] = np.clip(np.rint(part / wide) + zeros[group], 0, most)
    return Codes(codes, zeros, torch.from_numpy(scales), g_idx, bits)


def gptq_tensors(codes: Codes, zero_offset: int) -> dict[str, Tensor]:
    """Pack: codes along in, zero points less ``zero_offset`` along out, lowest bits first."""
    per_word = 32 // codes.bits
    rows, columns = codes.codes.shape
    qweight = np.zeros((rows // per_word, columns), dtype=np.uint32)
    for i in range(rows):
        shift = codes.bits * (i % per_word)
        qweight[i // per_word] |= (codes.codes[i] << shift).astype(np.uint32)
    stored = (codes.zeros - zero_offset) % 2**codes.bits
    qzeros = np.zeros((stored.shape[0], columns // per_word), dtype=np.uint32)
    for o in range(columns):
        qzeros[:, o // per_word] |= (stored[:, o] << codes.bits * (o % per_word)).astype(np.uint32)
    return {
        "qweight": _words(qweight),
        "qzeros": _words(qzeros),
        "scales": codes.scales,
        "g_idx": torch.from_numpy(codes.g_idx.astype(np.int32)),
    }


def awq_tensors(codes: Codes) -> dict[str, Tensor]:
    """Pack along out: place p of a word, from the lowest bits, holds column AWQ_PLACES[p] of its eight."""
    return {
        "qweight": _words(_awq_words(codes.codes)),
        "qzeros": _words(_awq_words(codes.zeros)),
        "scales": codes.scales,
    }


def _awq_words(values: Ints) -> NDArray[np.uint32]:
    words = np.zeros((values.shape[0], values.shape[1] // 8), dtype=np.uint32)
    for word in range(words.shape[1]):
        for place, column in enumerate(AWQ_PLACES):
            words[:, word] |= (values[:, 8 * word + column] << 4 * place).astype(np.uint32)
    return words


def _words(words: NDArray[np.uint32]) -> Tensor:
    return torch.from_numpy(words.view(np.int32))
