"""Holds a backend to the plain one on a decoder of noise: what a server asks of kernels before it trusts them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from manylora.adapters.types import AdapterWeights, LoraPair
from manylora.quant.nf4 import quantize_nf4
from manylora.server.kernels.backend import AnyBackend
from manylora.server.kernels.plain import PlainBackend
from manylora.server.kernels.sampling import SamplingColumns
from manylora.server.kernels.shape import DecoderShape
from manylora.server.kernels.step import (
    AttentionMetadata,
    RankRange,
    StepAdapters,
    StepBatch,
    WeightedAdapters,
)
from manylora.server.kernels.weights import DecoderWeights, LayerWeights, LinearWeight

HIDDEN, HEADS, HEAD_DIM, INTERMEDIATE, VOCAB, POSITIONS, RANK, BLOCK = 64, 2, 32, 128, 50, 64, 4, 20
MODULES = {
    "q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "k_proj": (HEAD_DIM, HIDDEN),
    "v_proj": (HEAD_DIM, HIDDEN),
    "o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "gate_proj": (INTERMEDIATE, HIDDEN),
    "up_proj": (INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
}
SHAPE = DecoderShape(1, HEADS, 1, HEAD_DIM, MODULES, ({name: name for name in MODULES},))
FEW = 3
"""Rows whose best tokens are looked for: a head may be read otherwise for so few."""
LENGTHS = (60, 1, 9)
"""Tokens of the sequences of the one step; the first uses an adapter, the second and third are the base's. Together
they are so many that products are those of prompts: by unpacked weights, and by tiles where there are some."""


def fault(backend: AnyBackend, near: float) -> str | None:
    """Return what ``backend`` computes otherwise than plain torch does, or None: a step of a 4-bit decoder.

    Its logits may be off by ``near`` of theirs.
    """
    with torch.inference_mode():
        logits, finite, tokens = _answers(backend)
        expected, _, _ = _answers(PlainBackend(torch.device("cpu"), torch.float32, backend.kv_dtype))
    off = float((logits.cpu() - expected).norm() / expected.norm())
    if not bool(finite.all()):
        return "sound numbers are told to be none"
    if tokens is not None and not torch.equal(tokens, logits[: len(tokens)].argmax(-1).cpu()):
        return "the best tokens that it finds are not those of its logits"
    return None if off <= near else f"its logits are {off:.2g} off plain torch's, of which {near} are allowed"


def _answers(backend: AnyBackend) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the logits of all tokens, whether these are finite, and the best token of the first few, if it samples."""
    noise = torch.Generator().manual_seed(0)
    model = backend.assemble(model_of_noise(backend, noise))
    kv, arena = backend.new_kv(SHAPE, len(LENGTHS) * 3, BLOCK), backend.new_arena(SHAPE, 3 * RANK)
    owned = dict.fromkeys(MODULES, RankRange(RANK, RANK + 2))
    arena.write(owned, adapter_of_noise(noise, outputs=True))
    batch = step_of_noise([0] * len(LENGTHS), LENGTHS, [((owned, 0.5),), (), ()])
    plan = backend.begin_step(model, batch, kv, arena)
    output = backend.collect(backend.launch(plan, batch.logits_rows, None))
    logits, finite = output.logits.clone(), output.finite
    if backend.sampling is None:
        return logits, finite, None
    found = backend.collect(
        backend.launch(plan, batch.logits_rows[:FEW], SamplingColumns.greedy(FEW))
    ).sampled
    return logits, finite, None if found is None else torch.from_numpy(found.ids.astype(np.int64))


def model_of_noise(backend: AnyBackend, noise: torch.Generator) -> DecoderWeights:
    """Return a 4-bit decoder of SHAPE on the backend's device."""

    def linear(*names: str, bias: bool = False) -> LinearWeight:
        parts = [quantize_nf4(_noise(noise, *MODULES[name])) for name in names]
        width = sum(part.shape[0] for part in parts)
        return backend.prepare(parts, torch.randn(width, generator=noise) if bias else None)

    def norm(width: int) -> Tensor:
        return (torch.randn(width, generator=noise) * 0.1 + 1).to(backend.device, backend.dtype)

    angles = torch.arange(POSITIONS)[:, None] * 100.0 ** -(torch.arange(HEAD_DIM) % (HEAD_DIM // 2) / 16)
    cos, sin = (each.to(backend.device) for each in (angles.cos(), angles.sin()))
    embedding = backend.prepare_embedding(torch.randn(VOCAB, HIDDEN, generator=noise), tied=True)
    layer = LayerWeights(
        attn_norm=norm(HIDDEN),
        qkv=linear("q_proj", "k_proj", "v_proj", bias=True),
        q_norm=norm(HEAD_DIM),
        k_norm=norm(HEAD_DIM),
        o=linear("o_proj"),
        mlp_norm=norm(HIDDEN),
        gate_up=linear("gate_proj", "up_proj"),
        down=linear("down_proj"),
        window=6,
    )
    head = backend.tie_head(embedding)
    return DecoderWeights(SHAPE, 1e-6, cos, sin, embedding, (layer,), norm(HIDDEN), head, True)


def adapter_of_noise(noise: torch.Generator, *, outputs: bool = False) -> AdapterWeights:
    """Return an adapter of RANK for all modules of SHAPE; ``outputs``: their own are changed too, by two rows more."""
    pairs = {
        name: LoraPair(_noise(noise, RANK, wide), _noise(noise, RANK, out) * 0.3)
        for name, (out, wide) in MODULES.items()
    }
    if not outputs:
        return AdapterWeights(pairs)
    gains, offsets = (
        {name: torch.randn(out, generator=noise) * 0.3 for name, (out, _) in MODULES.items()}
        for _ in range(2)
    )
    return AdapterWeights(pairs, gains, offsets)


def _noise(noise: torch.Generator, rows: int, wide: int) -> Tensor:
    return torch.randn(rows, wide, generator=noise).mul_(wide**-0.5)


def step_of_noise(
    computed: Sequence[int], lengths: Sequence[int], uses: Sequence[WeightedAdapters]
) -> StepBatch:
    """Return a step of sequences that have ``computed`` tokens and compute so many more, their blocks backwards."""
    tables = [[3 * row + 3, 3 * row + 2, 3 * row + 1] for row in range(len(lengths))]
    every = np.arange(sum(lengths), dtype=np.int32)
    attention = AttentionMetadata.of_rows(computed, lengths, tables, BLOCK)
    ids = (7 * every + sum(computed)) % VOCAB
    return StepBatch(ids.astype(np.int32), attention, StepAdapters.of_rows(uses), every)
