"""Rotary embedding tables: default, linear, Llama 3 and YaRN scaling, as transformers computes them, in float32."""

import math

import torch
from torch import Tensor

from manylora.server.model.config import RopeConfig


def rope_tables(
    config: RopeConfig, head_dim: int, positions: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cos and sin, float32 [positions, head_dim], both halves alike (2104.09864)."""
    frequencies, scale = _frequencies(config, head_dim)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * scale).to(device), (angles.sin() * scale).to(device)


def _frequencies(config: RopeConfig, dim: int) -> tuple[Tensor, float]:
    """Return float32 [dim / 2] and the factor of cos and sin."""
    base = 1.0 / config.theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    if config.kind == "linear":
        return base / config.factor, 1.0
    if config.kind == "llama3":
        return _llama3(base, config), 1.0
    if config.kind == "yarn":
        return _yarn(base, config, dim), config.attention_factor
    return base, 1.0


def _llama3(base: Tensor, config: RopeConfig) -> Tensor:
    """Slow down long wavelengths by ``factor``, keep short ones, blend in between (Llama 3.1)."""
    wavelengths = 2 * math.pi / base
    longest = config.original_max_position / config.low_freq_factor
    shortest = config.original_max_position / config.high_freq_factor
    slowed = torch.where(wavelengths > longest, base / config.factor, base)
    blend = (config.original_max_position / wavelengths - config.low_freq_factor) / (
        config.high_freq_factor - config.low_freq_factor
    )
    blended = (1 - blend) * slowed / config.factor + blend * slowed
    between = ~(wavelengths < shortest) & ~(wavelengths > longest)
    return torch.where(between, blended, slowed)


def _yarn(base: Tensor, config: RopeConfig, dim: int) -> Tensor:
    """Interpolate slow dimensions by ``factor``, keep fast ones, ramp in between (2309.00071, section 3.2)."""

    def dimension(rotations: float) -> float:
        turns = config.original_max_position / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(config.theta))

    first, last = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        first, last = math.floor(first), math.ceil(last)
    low, high = max(first, 0), min(last, dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return base / config.factor * ramp + base * (1 - ramp)
