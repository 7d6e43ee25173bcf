"""bitsandbytes' 8-bit dynamic map (1511.04561), in which NF4's double quantisation stores absmax values."""

from functools import cache

import torch
from torch import Tensor

EXPONENTS = 7
GRID = 65_536


@cache
def dynamic_map() -> Tensor:
    """Return the 256 values, sorted, float32: seven decades with ever more fraction bits, zero, and one."""
    values = [0.0, 1.0]
    for exponent in range(EXPONENTS):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        means = 10 ** (exponent - EXPONENTS + 1) * ((bounds[:-1] + bounds[1:]) / 2.0)
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32)


def quantize_dynamic(values: Tensor, blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise float32 [n]; return codes uint8 [n], absmax float32 [⌈n / blocksize⌉] and the map."""
    code_map = dynamic_map().to(values.device)
    count = values.numel()
    padded = torch.nn.functional.pad(values, (0, -count % blocksize)).view(-1, blocksize)
    absmax = padded.abs().amax(dim=1)
    scaled = (padded * (1.0 / absmax)[:, None]).view(-1)[:count]
    if values.device.type == "cpu":
        scaled = _on_grid(scaled)
    codes = torch.bucketize(scaled, (code_map[1:] + code_map[:-1]) / 2).to(torch.uint8)
    # A block of zeros gave 0 · ∞; bitsandbytes gives it code 0.
    codes[(absmax == 0).repeat_interleave(blocksize)[:count]] = 0
    return codes, absmax, code_map


def _on_grid(scaled: Tensor) -> Tensor:
    """Round [-1, 1] to 65,536 steps, as bitsandbytes' CPU kernel does before it looks up the nearest."""
    steps = GRID - 1
    index = ((scaled.clamp(-1, 1) + 1.0) * (0.5 * steps) + 0.5).nan_to_num().to(torch.int32)
    return (2.0 * index).div_(steps).sub_(1.0)


def dequantize_dynamic(codes: Tensor, absmax: Tensor, code_map: Tensor, blocksize: int) -> Tensor:
    """Return map[code] · absmax of the block, float32 [n]."""
    scales = absmax.repeat_interleave(blocksize)[: codes.numel()]
    return code_map[codes.view(-1).int()] * scales
