"""The spec of every kernel: plain torch in float32, loops where they are clearest. Nothing serves from here.

Backends are held against these functions. All return float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from manylora.server.kernels.output_rows import OutputRows
from manylora.server.kernels.step import AttentionMetadata, LoraSpan


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = weight · x / √(mean(x²) + eps), over the last dimension (1910.07467). x [..., n], weight [n]."""
    x = x.float()
    return weight.float() * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[t] = weight x[t] + bias. x [T, in], weight [out, in] (a 4-bit one is dequantised first), bias [out]."""
    y = x.float() @ weight.float().T
    return y if bias is None else y + bias.float()


def silu_gate(gate_up: Tensor) -> Tensor:
    """h = silu(gate) · up, for gate_up [T, 2 · n] with the gate in its first half (2002.05202)."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + D/2) of each head by the token's angles (2104.09864, half-split layout).

    x [T, H, D]; cos and sin [T, D], both halves alike.
    """
    x = x.float()
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x * cos[:, None, :].float() + rotated * sin[:, None, :].float()


def lora(x: Tensor, arena_a: Tensor, arena_b: Tensor, module: str, spans: Sequence[LoraSpan]) -> Tensor:
    """Δy[t] = Σ weight · (x[t] A[rows]ᵀ) B[rows] over the adapters of t's span that target ``module``.

    x [T, in]; arena_a [rows, in]; arena_b [rows, out], scales folded in. Tokens of no span get zero. Weights are
    float32, like all that is computed here.
    """
    delta = x.new_zeros(x.shape[0], arena_b.shape[1], dtype=torch.float32)
    for span in spans:
        tokens = slice(span.start, span.start + span.length)
        for ranges, weight in span.adapters:
            if (owned := ranges.get(module)) is not None:
                rows = slice(owned.start, owned.start + owned.rank)
                shrunk = x[tokens].float() @ arena_a[rows].float().T
                delta[tokens] += weight * (shrunk @ arena_b[rows].float())
    return delta


def outputs(
    y: Tensor, bias: Tensor | None, arena_b: Tensor, module: str, spans: Sequence[LoraSpan], rows: OutputRows
) -> Tensor:
    """y[t] + (y[t] − bias) ⊙ Σ weight · gain + Σ weight · offset over the adapters of t's span (2402.09353).

    y [T, out] is W x + bias, before adapters' deltas; arena_b [rows, out] holds gains and offsets in ``rows``.
    """
    after = y.float().clone()
    for span in spans:
        tokens = slice(span.start, span.start + span.length)
        own = y[tokens].float() if bias is None else y[tokens].float() - bias.float()
        for ranges, weight in span.adapters:
            if (owned := ranges.get(module)) is None:
                continue
            if (row := rows.gain(module, owned)) is not None:
                after[tokens] += own * (weight * arena_b[row].float())
            if (row := rows.offset(module, owned)) is not None:
                after[tokens] += weight * arena_b[row].float()
    return after


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    metadata: AttentionMetadata,
    block_size: int,
    window: int | None,
) -> Tensor:
    """o[t] = Σ_j softmax_j(q[t]·k[j] / √D) v[j] over j ≤ position of t (and j > position − window if set).

    q [T, H, D]; caches [slots, KV heads, D], this step's keys and values already written; each KV head serves
    H / KV heads query heads in a row (2305.13245). Returns [T, H, D].
    """
    out = torch.zeros_like(q, dtype=torch.float32)
    group = q.shape[1] // k_cache.shape[1]
    tables = torch.from_numpy(metadata.block_tables).to(q.device)
    starts = metadata.query_start.tolist()
    for row, context in enumerate(metadata.context_lens.tolist()):
        index = torch.arange(context, device=q.device)
        slots = tables[row][index // block_size] * block_size + index % block_size
        keys = k_cache[slots].float().repeat_interleave(group, dim=1)
        values = v_cache[slots].float().repeat_interleave(group, dim=1)
        for token in range(starts[row], starts[row + 1]):
            position = int(metadata.positions[token])
            seen = slice(max(0, position - window + 1) if window else 0, position + 1)
            scores = torch.einsum("hd,lhd->hl", q[token].float(), keys[seen]) * q.shape[-1] ** -0.5
            out[token] = torch.einsum("hl,lhd->hd", scores.softmax(-1), values[seen])
    return out
