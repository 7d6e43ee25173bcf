"""Adapters of several tasks in one pass over one base: each token goes through its own task's adapter alone.

Each task has a PEFT model of its own on a skeleton of the base (skeleton.py), which holds the matrices and is never
run. A hook on each of the base's adapted layers adds what the tasks' adapters make of their spans of tokens.
"""

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from manylora.training.bases.initial import ADAPTER, Residual, lora_layers
from manylora.training.tasks.batch import Span

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer


@dataclass(slots=True)
class Mixture:
    """Which tokens of the present pass are whose: what the hooks of one base share. No spans: the base alone."""

    spans: tuple[Span, ...] = ()
    """Each task's tokens."""
    seeds: tuple[int, ...] = ()
    """Of each task's dropout, 32 bits; none: no dropout."""

    @contextmanager
    def of(self, spans: Sequence[Span], seeds: Sequence[int] = ()) -> Iterator[None]:
        """Hold ``spans`` from the forward pass to the end of the backward pass, where checkpointing comes back."""
        assert not self.spans, "one batch at a time"
        self.spans, self.seeds = tuple(spans), tuple(seeds)
        try:
            yield
        finally:
            self.spans, self.seeds = (), ()


def mix_adapters(base: nn.Module, models: Sequence["PeftModel"]) -> Mixture:
    """Hook the adapters of ``models``, one of each task, into ``base``, and return the switch for its next pass."""
    mixture = Mixture()
    layers: dict[str, list[tuple[int, LoraLayer]]] = {}
    for task, model in enumerate(models):
        for path, layer in lora_layers(model):
            layers.setdefault(path, []).append((task, layer))
    for index, (path, adapted) in enumerate(layers.items()):
        base.get_submodule(path).register_forward_hook(_MixedLayer(index, tuple(adapted), mixture))
    return mixture


@dataclass(frozen=True, slots=True)
class _Part:
    """What an adapter does to its task's span of tokens, besides its matrices."""

    start: int
    end: int
    scale: float
    dropout: float
    seed: int


@dataclass(frozen=True, slots=True)
class _MixedLayer:
    """A forward hook of one of the base's layers."""

    index: int
    """Of the layer, so that no two draw the same dropout."""
    adapted: tuple[tuple[int, "LoraLayer"], ...]
    """Tasks, and the layers of their models that stand for this one."""
    mixture: Mixture = field(repr=False)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Add to the layer's output what each task's adapter makes of its tokens."""
        parts: list[_Part] = []
        matrices: list[Tensor] = []
        seeds = self.mixture.seeds
        for task, layer in self.adapted if self.mixture.spans else ():
            start, end = self.mixture.spans[task]
            if start == end or layer.disable_adapters:
                continue
            seed = zlib.crc32(self.index.to_bytes(4, "little"), seeds[task]) if seeds else 0
            dropout = float(getattr(layer.lora_dropout[ADAPTER], "p", 0.0)) if seeds else 0.0
            parts.append(_Part(start, end, layer.scaling[ADAPTER], dropout, seed))
            matrices += (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
            if isinstance(layer.base_layer, Residual):
                # What the factors started as (PiSSA, OLoRA) is taken off the base.
                parts.append(_Part(start, end, -layer.base_layer.scale, 0.0, 0))
                matrices += (layer.base_layer.start_a, layer.base_layer.start_b)
        if not parts:
            return output
        added: Tensor = _AddMixed.apply(inputs[0], output, tuple(parts), *matrices)  # type: ignore[no-untyped-call]
        return added


class _AddMixed(torch.autograd.Function):
    """y[span] += scale · dropout(x[span]) Aᵀ Bᵀ for each part. Matrices come as A [r, in], B [out, r], A, B, …

    One node with a handful of products: made of torch's own operations it would be a dozen nodes for each part, and at
    small widths nodes are what costs. Dropout's masks are drawn anew from their seeds, never kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, parts: tuple[_Part, ...], *matrices: Tensor) -> Tensor:
        # bitsandbytes returns a view from a node of its own, which autograd lets nobody change in place.
        out = y.clone() if y._is_view() else y
        flat_x, flat_out = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
        dtype = _dtype(x.device.type, matrices[0])
        middles: list[Tensor] = []
        for part, a, b in zip(parts, matrices[::2], matrices[1::2], strict=True):
            tokens = _dropped(flat_x[part.start : part.end].to(dtype), _mask(part, x))
            middle = tokens @ a.to(dtype).t()
            _add(flat_out[part.start : part.end], middle, b.to(dtype).t(), part.scale)
            middles.append(middle)
        if out is y:
            ctx.mark_dirty(y)
        ctx.save_for_backward(x, *middles, *matrices)
        ctx.parts, ctx.dtype = parts, dtype
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts: tuple[_Part, ...] = ctx.parts
        dtype: torch.dtype = ctx.dtype
        x, *rest = ctx.saved_tensors
        middles, matrices = rest[: len(parts)], rest[len(parts) :]
        flat_x, flat_g = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        grad_x = torch.zeros_like(flat_x) if ctx.needs_input_grad[0] else None
        grads: list[Tensor | None] = []
        for at, (part, middle) in enumerate(zip(parts, middles, strict=True)):
            a, b = matrices[2 * at], matrices[2 * at + 1]
            outer = flat_g[part.start : part.end].to(dtype)
            inner = (outer @ b.to(dtype)).mul_(part.scale)
            mask = _mask(part, x)
            if ctx.needs_input_grad[3 + 2 * at]:
                tokens = _dropped(flat_x[part.start : part.end].to(dtype), mask)
                grads.append((inner.t() @ tokens).to(a.dtype))
                grads.append((outer.t() @ middle).mul_(part.scale).to(b.dtype))
            else:
                grads += (None, None)
            if grad_x is not None:
                grad_x[part.start : part.end] += _dropped(inner @ a.to(dtype), mask)
        return grad_x.view(x.shape) if grad_x is not None else None, gradient, None, *grads


def _dtype(device: str, matrix: Tensor) -> torch.dtype:
    """Return what peft's layers compute in: the matrices' own type, or autocast's."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else matrix.dtype


def _add(y: Tensor, middle: Tensor, b: Tensor, scale: float) -> None:
    if y.dtype == middle.dtype:
        y.addmm_(middle, b, alpha=scale)
    else:
        y += (middle @ b).mul_(scale)


@dataclass(frozen=True, slots=True)
class _Mask:
    """Which inputs dropout keeps."""

    kept: Tensor
    """bool [span, in]."""
    factor: float
    """What the kept ones are multiplied by."""


def _mask(part: _Part, x: Tensor) -> _Mask | None:
    """Draw a part's dropout: by seed and shape alone, and in 16-bit pieces, which takes a third of torch's time."""
    levels = round((1 - part.dropout) * (1 << 16))
    if levels == 1 << 16:
        return None
    shape = (part.end - part.start, x.shape[-1])
    generator = torch.Generator(x.device).manual_seed(part.seed)
    words = torch.empty(math.ceil(math.prod(shape) / 4), dtype=torch.int64, device=x.device)
    pieces = words.random_(-(1 << 63), None, generator=generator).view(torch.int16)[: math.prod(shape)]
    return _Mask((pieces < levels - (1 << 15)).view(shape), (1 << 16) / levels)


def _dropped(tokens: Tensor, mask: _Mask | None) -> Tensor:
    return tokens if mask is None else (tokens * mask.kept).mul_(mask.factor)
