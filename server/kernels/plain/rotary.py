"""Rope in the plain backend: angles of a step's positions, and the rotation."""

from torch import Tensor

from manylora.server.kernels.weights import DecoderWeights


def angles(weights: DecoderWeights, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin of ``positions``, int64 [T]: float32 [T, 1, head dim], sin's first half negated."""
    cos, sin = (table.index_select(0, positions)[:, None] for table in (weights.cos, weights.sin))
    sin[..., : sin.shape[-1] // 2].neg_()
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """reference.rope of x [T, H, D] by ``angles``, computed in float32 and returned in x's dtype."""
    return x.roll(x.shape[-1] // 2, -1).mul(sin).addcmul_(x, cos).to(x.dtype)
