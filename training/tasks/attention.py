"""Attention over a mixed batch: the documents of one flat sequence, each seeing itself alone.

Everything else in a decoder works token by token, so only attention pays for documents of different lengths: queries,
keys and values are laid out on the batch's grids, a document a line, padded with zeros on the right. There causality
alone keeps padding out of every real token's sight, so no mask is made, and torch's fused kernels can be used.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from manylora.training.tasks.batch import Grid

NAME = "manylora_mixed"
"""The implementation's name for transformers: ``model.set_attn_implementation(NAME)``."""


class _ToGrids(torch.autograd.Function):
    """Several [T, …] to, for each grid, as many [cells, …]."""

    @staticmethod
    def forward(ctx: Any, grids: tuple[Grid, ...], *states: Tensor) -> tuple[Tensor, ...]:
        ctx.grids, ctx.tokens = grids, states[0].shape[0]
        return tuple(_spread(each, grid) for grid in grids for each in states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        count = len(gradients) // len(ctx.grids)
        return None, *(_collect(gradients[at::count], ctx.grids, ctx.tokens) for at in range(count))


class _FromGrids(torch.autograd.Function):
    """A [cells, …] for each grid back to one [T, …]."""

    @staticmethod
    def forward(ctx: Any, grids: tuple[Grid, ...], tokens: int, *states: Tensor) -> Tensor:
        ctx.grids = grids
        return _collect(states, grids, tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(_spread(gradient, grid) for grid in ctx.grids)


def _spread(tokens: Tensor, grid: Grid) -> Tensor:
    cells = tokens.new_zeros(grid.documents * grid.length, *tokens.shape[1:])
    return cells.index_copy_(0, grid.cells, tokens.index_select(0, grid.tokens))


def _collect(states: Sequence[Tensor], grids: Sequence[Grid], tokens: int) -> Tensor:
    out = states[0].new_empty(tokens, *states[0].shape[1:])
    for cells, grid in zip(states, grids, strict=True):
        out.index_copy_(0, grid.tokens, cells.index_select(0, grid.cells))
    return out


def mixed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    grids: tuple[Grid, ...],
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend within documents, by transformers' calling convention; ``grids`` are the batch's.

    ``query`` [1, heads, T, D], ``key`` and ``value`` [1, KV heads, T, D]; returns [1, T, heads, D].
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    flat = [states[0].transpose(0, 1) for states in (query, key, value)]
    spread = _ToGrids.apply(grids, *flat)  # type: ignore[no-untyped-call]
    answers: list[Tensor] = []
    for at, grid in enumerate(grids):
        lines = [
            cells.view(grid.documents, grid.length, *cells.shape[1:]).transpose(1, 2)
            for cells in spread[3 * at : 3 * at + 3]
        ]
        mask = _band(grid.length, sliding_window, query.device)
        out, _ = sdpa_attention_forward(module, *lines, mask, **options)
        answers.append(out.reshape(grid.documents * grid.length, *out.shape[2:]))
    tokens: Tensor = _FromGrids.apply(grids, query.shape[2], *answers)  # type: ignore[no-untyped-call]
    return tokens.unsqueeze(0), None


def _band(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return [1, 1, L, L] bool, a token sees itself and the ``window`` - 1 before it; None where it sees all."""
    if window is None or window >= length:
        return None
    seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return seen.triu(1 - window)[None, None]


def register_attention() -> None:
    """Make ``NAME`` known to transformers, which makes no mask for an implementation that it knows no mask for."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, mixed_attention)
