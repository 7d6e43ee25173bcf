"""Adapters of several tasks beside one frozen linear layer: each token goes through its own task's adapter alone.

peft makes and holds the matrices, one adapter a task, so initialisation, targets and files are peft's. Its forward
knows one adapter at a time while training, so a hook on each adapted layer adds what the tasks' spans of tokens get.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training.tasks.batch import Span

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(slots=True)
class Mixture:
    """Which tokens of the present forward and backward pass are whose. The hooks of one model share one."""

    spans: tuple[Span, ...] = ()
    """Of each task, over the tokens of the batch; empty: no adapter takes part."""
    dropout_seeds: tuple[int, ...] = ()
    """Of each task; empty: no dropout."""

    @contextmanager
    def of(self, spans: Sequence[Span], dropout_seeds: Sequence[int] = ()) -> Iterator[None]:
        """Hold ``spans`` from the forward pass to the end of the backward pass, which checkpointing computes anew."""
        assert not self.spans, "one batch at a time"
        self.spans, self.dropout_seeds = tuple(spans), tuple(dropout_seeds)
        try:
            yield
        finally:
            self.spans, self.dropout_seeds = (), ()


@dataclass(frozen=True, slots=True)
class Factors:
    """One task's adapter of one layer: y += scale · x Aᵀ Bᵀ."""

    task: int
    a: Tensor
    """[r, in]."""
    b: Tensor
    """[out, r]."""
    scale: float
    dropout: float


@dataclass(frozen=True, slots=True)
class _Part:
    """What one task does to its span of tokens, besides its matrices."""

    start: int
    end: int
    scale: float
    dropout: float
    seed: int


@dataclass(frozen=True, slots=True)
class MixedLayer:
    """A forward hook of one adapted layer."""

    index: int
    """Of the layer in the model, so that no two draw the same dropout."""
    factors: tuple[Factors, ...]
    mixture: Mixture = field(repr=False)

    def __call__(self, module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Add to the layer's output, in place, what each task's adapter makes of its tokens."""
        parts: list[_Part] = []
        matrices: list[Tensor] = []
        seeds = self.mixture.dropout_seeds
        for each in self.factors:
            start, end = self.mixture.spans[each.task] if self.mixture.spans else (0, 0)
            if start == end:
                continue
            seed = seeds[each.task] * 8191 + self.index if seeds else 0
            parts.append(_Part(start, end, each.scale, each.dropout if seeds else 0.0, seed))
            matrices += (each.a, each.b)
        if not parts:
            return output
        added: Tensor = _AddMixed.apply(inputs[0], output, tuple(parts), *matrices)
        return added


class _AddMixed(torch.autograd.Function):
    """y[span] += scale · dropout(x[span]) Aᵀ Bᵀ for each part, in place.

    One node with a handful of matrix products: composed of torch's own operations, the same costs three times as many
    nodes, and at small widths those are the time. Dropout's masks are drawn anew from their seeds, never kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, parts: tuple[_Part, ...], *matrices: Tensor) -> Tensor:
        # bitsandbytes returns a view from a node of its own, which autograd lets nobody change in place.
        out = y.clone() if y._is_view() else y
        flat_x, flat_y = x.reshape(-1, x.shape[-1]), out.view(-1, y.shape[-1])
        dtype = _dtype(x.device.type, matrices[0])
        middles: list[Tensor] = []
        for part, a, b in zip(parts, matrices[::2], matrices[1::2], strict=True):
            middle = _input(flat_x, part, dtype) @ a.to(dtype).t()
            _add(flat_y[part.start : part.end], middle, b.to(dtype).t(), part.scale)
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
        grads: list[Tensor] = []
        for part, middle, a, b in zip(parts, middles, matrices[::2], matrices[1::2], strict=True):
            outer = flat_g[part.start : part.end].to(dtype)
            inner = (outer @ b.to(dtype)).mul_(part.scale)
            grads.append((inner.t() @ _input(flat_x, part, dtype)).to(a.dtype))
            grads.append((outer.t() @ middle).mul_(part.scale).to(b.dtype))
            if grad_x is not None:
                grad_x[part.start : part.end] = _dropped(inner @ a.to(dtype), part)
        return grad_x.view(x.shape) if grad_x is not None else None, gradient, None, *grads


def _dtype(device: str, matrix: Tensor) -> torch.dtype:
    """Return what peft's layers compute in: the matrices' own type, or autocast's."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else matrix.dtype


def _input(flat_x: Tensor, part: _Part, dtype: torch.dtype) -> Tensor:
    return _dropped(flat_x[part.start : part.end].to(dtype), part)


def _add(y: Tensor, middle: Tensor, b: Tensor, scale: float) -> None:
    if y.dtype == middle.dtype:
        y.addmm_(middle, b, alpha=scale)
    else:
        y += (middle @ b).mul_(scale)


def _dropped(tokens: Tensor, part: _Part) -> Tensor:
    """Return ``tokens`` with dropout's zeros and scale. The mask depends on the seed and the span's length alone."""
    if not part.dropout:
        return tokens
    generator = torch.Generator(tokens.device).manual_seed(part.seed)
    kept = torch.empty_like(tokens).bernoulli_(1 - part.dropout, generator=generator)
    return tokens * kept.div_(1 - part.dropout)


def mix_adapters(model: "PeftModel", names: Sequence[str]) -> Mixture:
    """Hook the adapters ``names`` of ``model``, the tasks in this order, into one forward pass; return its switch.

    peft's own forward is turned off for good: the model now needs its adapters' spans, or is the base alone.
    """
    from peft.tuners.lora import LoraLayer

    mixture = Mixture()
    model.base_model.disable_adapter_layers()
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for index, layer in enumerate(layers):
        factors = tuple(
            Factors(task, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], _rate(layer, name))
            for task, name in enumerate(names)
            if name in layer.lora_A
        )
        for each in factors:
            each.a.requires_grad_(True)
            each.b.requires_grad_(True)
        layer.register_forward_hook(MixedLayer(index, factors, mixture))
    return mixture


def _rate(layer: Any, name: str) -> float:
    """Return the dropout of one adapter; peft puts an Identity where there is none."""
    return float(getattr(layer.lora_dropout[name], "p", 0.0))


def factors_of(model: "PeftModel", name: str) -> dict[str, torch.nn.Parameter]:
    """Return one adapter's trained matrices by their full names, in the model's order."""
    mark = f".{name}.weight"
    return {
        full: parameter
        for full, parameter in model.named_parameters()
        if full.endswith((f".lora_A{mark}", f".lora_B{mark}"))
    }
