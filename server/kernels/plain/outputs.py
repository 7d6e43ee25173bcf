"""What adapters do to a module's own output, in plain torch: y += (y − bias) ⊙ Σ weight · gain + Σ weight · offset.

No token is touched whose adapters do nothing to it. All is elementwise and in float32, in the order of a token's own
adapters, so that its bits don't depend on its company. The bias that y has in it is the base's own and isn't scaled:
what is lost by taking it away again is times a gain, and so less than what adding it lost.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from manylora.server.kernels.output_rows import OutputRows
from manylora.server.kernels.step import LORA_MODULES, Ints, LoraSpan

MOST_TOKENS = 256
"""At a time: long prompts would take several times their projection's memory."""
Weighted: TypeAlias = tuple[tuple[int, float], ...]
"""(row of the arena, weight) in the order of a mixture."""


@dataclass(frozen=True, slots=True)
class Terms:
    """Σ weight · row for each of n tokens, all of which have equally many terms."""

    rows: Tensor
    """int64 [terms, n]: rows of the arena's B."""
    weights: Tensor
    """float32 [terms, n, 1]; what weighs 0 is no term."""

    def summed(self, b: Tensor) -> Tensor:
        """Return the sums, float32 [n, out]; b [rows, out]."""
        total = b[self.rows[0]].float() * self.weights[0]
        for own, weight in zip(self.rows[1:], self.weights[1:], strict=True):
            total += b[own].float() * weight
        return total


@dataclass(frozen=True, slots=True)
class OutputBlock:
    """Tokens that have equally many gains and equally many offsets."""

    tokens: Tensor
    """int64 [n]"""
    gains: Terms | None
    offsets: Terms | None

    def apply(self, b: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """Scale and shift these tokens' rows of ``out`` [T, o], which has ``bias`` [o] in it; b [rows, o]."""
        before = out[self.tokens].float()
        out.index_copy_(0, self.tokens, changed(before, bias, b, self.gains, self.offsets).to(out.dtype))


def changed(
    before: Tensor, bias: Tensor | None, b: Tensor, gains: Terms | None, offsets: Terms | None
) -> Tensor:
    """Return scaled and shifted rows of a module's output, float32 [n, out]."""
    after = before
    if gains is not None:
        own = before if bias is None else before - bias.float()
        after = after + own * gains.summed(b)
    return after if offsets is None else after + offsets.summed(b)


def build_outputs(
    spans: Sequence[LoraSpan], output_rows: OutputRows, device: torch.device
) -> dict[str, tuple[OutputBlock, ...]]:
    """Return what a step's adapters do to modules' outputs; modules whose outputs nobody changes are absent."""
    if not output_rows:
        return {}
    built = {module: tuple(_blocks(spans, module, output_rows, device)) for module in LORA_MODULES}
    return {module: blocks for module, blocks in built.items() if blocks}


def _blocks(
    spans: Sequence[LoraSpan], module: str, output_rows: OutputRows, device: torch.device
) -> Iterator[OutputBlock]:
    alike: dict[tuple[int, int], list[tuple[LoraSpan, Weighted, Weighted]]] = {}
    for span in spans:
        used = [(ranges[module], weight) for ranges, weight in span.adapters if module in ranges and weight]
        gains, offsets = (
            tuple((row, weight) for owned, weight in used if (row := of(module, owned)) is not None)
            for of in (output_rows.gain, output_rows.offset)
        )
        if gains or offsets:
            alike.setdefault((len(gains), len(offsets)), []).append((span, gains, offsets))
    for _, uses in sorted(alike.items()):
        spans_of, gains_of, offsets_of = zip(*uses, strict=True)
        tokens = np.concatenate([np.arange(span.start, span.start + span.length) for span in spans_of])
        owners = np.repeat(np.arange(len(uses), dtype=np.int32), [span.length for span in spans_of])
        for first in range(0, len(tokens), MOST_TOKENS):
            index = torch.from_numpy(tokens[first : first + MOST_TOKENS]).to(device)
            own = owners[first : first + MOST_TOKENS]
            yield OutputBlock(index, _terms(gains_of, own, device), _terms(offsets_of, own, device))


def _terms(each: Sequence[Weighted], owners: Ints, device: torch.device) -> Terms | None:
    """Return the terms of tokens of which each span has its own in ``each``; ``owners`` [n] are their spans."""
    if not each[0]:
        return None
    rows = np.array([[row for row, _ in own] for own in each], dtype=np.int64)
    weights = np.array([[weight for _, weight in own] for own in each], dtype=np.float32)
    return Terms(
        torch.from_numpy(rows[owners].T.copy()).to(device),
        torch.from_numpy(weights[owners].T.copy())[:, :, None].to(device),
    )
