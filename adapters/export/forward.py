"""One forward pass of the real transformers model with several sets of weights side by side, none of it in memory.

The model is built without weights. Each layer's forward is replaced by one that reads its parameter, applies every
variant's to that variant's share of the batch, a few rows at a time in float32, and lets it go. So variants that share
a base read and dequantise it once, and memory is one tensor as it is stored.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import functional_call

from manylora.adapters.export.matrix_change import Change
from manylora.adapters.export.outline import EMBEDDING, HEAD, empty_model
from manylora.adapters.export.rows import Rows, chunks
from manylora.adapters.export.samples import Row

LAST_POSITIONS = 10
"""Of each prompt, whose logits are kept: with a large vocabulary, those of a hundred are as large as its embedding."""


class Variant(Protocol):
    """A set of weights to run: W from ``unchanged``, and ``change`` applied beside it, as an adapter is served."""

    def unchanged(self, name: str) -> Rows:
        """Return a parameter."""
        ...

    def change(self, name: str) -> Change | None:
        """Return the factors beside it, if any."""
        ...


class Plain:
    """Weights with nothing beside them."""

    def __init__(self, rows: Callable[[str], Rows]) -> None:
        self._rows = rows

    def unchanged(self, name: str) -> Rows:
        """Return a parameter."""
        return self._rows(name)

    def change(self, name: str) -> Change | None:
        """Return None."""
        return None


@dataclass(frozen=True, slots=True)
class Outputs:
    """What one variant computed."""

    logits: Tensor
    """float32 [positions, vocabulary], at the last positions of the rows without an answer."""
    loss: float | None
    """Mean cross-entropy over the answers' tokens, in nats; None if no row has one."""


def run_variants(
    config: Mapping[str, object],
    variants: Mapping[str, Variant],
    rows: Sequence[Row],
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Outputs]:
    """Run ``rows`` through every variant and return what each computed, by its name."""
    model = empty_model(config)
    chosen = list(variants.values())
    hidden = _hidden(model, chosen, rows, progress)
    computed: dict[str, Outputs] = {}
    places = [
        (number, row.answer - 1, len(row.tokens) - 1)
        for number, row in enumerate(rows)
        if row.answer < len(row.tokens)
    ]
    targets = torch.tensor([token for row in rows for token in row.tokens[row.answer :]], dtype=torch.long)
    with torch.no_grad():
        for name, states in zip(
            variants, hidden.view(len(chosen), len(rows), *hidden.shape[1:]), strict=True
        ):
            prompts = [
                states[n, : len(row.tokens)][-LAST_POSITIONS:]
                for n, row in enumerate(rows)
                if row.answer >= len(row.tokens)
            ]
            logits = torch.cat(list(_pieces(variants[name], HEAD, torch.cat(prompts))), dim=-1)
            answers = [states[number, first:last] for number, first, last in places]
            loss = _loss(variants[name], torch.cat(answers), targets) if answers else None
            computed[name] = Outputs(logits, loss)
    return computed


def _hidden(
    model: Any, variants: Sequence[Variant], rows: Sequence[Row], progress: Callable[[float], None]
) -> Tensor:
    """Return the last hidden states, float32 [variants · rows, longest row, hidden]."""
    leaves = [(path, module) for path, module in model.named_modules() if module._parameters]
    done = 0

    def one_more() -> None:
        nonlocal done
        done += 1
        progress(min(1.0, done / len(leaves)))

    for path, module in leaves:
        module.forward = _forward_of(path, module, variants, one_more)
    longest = max(len(row.tokens) for row in rows)
    # Padded on the right, where a causal model's earlier positions don't look.
    ids = torch.tensor([[*row.tokens, *[0] * (longest - len(row.tokens))] for row in rows])
    with torch.no_grad():
        states: Tensor = model.model(
            input_ids=ids.repeat(len(variants), 1), use_cache=False
        ).last_hidden_state
    return states


def _forward_of(
    path: str, module: torch.nn.Module, variants: Sequence[Variant], done: Callable[[], None]
) -> Callable[[Tensor], Tensor]:
    """Return what takes the place of a layer's forward."""
    # A twin with the forward of its class, for layers that are neither linear nor an embedding.
    twin = copy(module)

    def compute(variant: Variant, x: Tensor) -> Tensor:
        if isinstance(module, torch.nn.Linear):
            y = torch.cat(list(_pieces(variant, f"{path}.weight", x)), dim=-1)
            return y if module.bias is None else y + _all_of(variant, f"{path}.bias")
        if isinstance(module, torch.nn.Embedding):
            return _embed(variant, x)
        weights = {name: _all_of(variant, f"{path}.{name}") for name in module._parameters}
        normed: Tensor = functional_call(twin, weights, (x,))
        return normed

    def forward(x: Tensor) -> Tensor:
        shares = x.chunk(len(variants))
        parts = [compute(variant, share) for variant, share in zip(variants, shares, strict=True)]
        done()
        return torch.cat(parts)

    return forward


def _pieces(variant: Variant, name: str, x: Tensor) -> Iterator[Tensor]:
    """Yield x W'ᵀ, some output features at a time, with the factors applied to x rather than to W."""
    source, change = variant.unchanged(name), variant.change(name)
    beside = None if change is None else change.beside(x)
    for first, last in chunks(source.shape):
        rows = source.rows(first, last)
        y = x @ rows.T
        yield y if beside is None else beside(y, rows, slice(first, last))


def _embed(variant: Variant, ids: Tensor) -> Tensor:
    source, change = variant.unchanged(EMBEDDING), variant.change(EMBEDDING)
    flat = ids.reshape(-1)
    found = source.take(flat)
    if change is not None:
        found = change.on(found, flat)
    return found.view(*ids.shape, -1)


def _all_of(variant: Variant, name: str) -> Tensor:
    """Return a vector: norms and biases have no factors and are small."""
    source = variant.unchanged(name)
    return source.rows(0, source.shape[0])


def _loss(variant: Variant, states: Tensor, targets: Tensor) -> float:
    """Return the mean cross-entropy at ``states``, the vocabulary taken piece by piece."""
    total = torch.full((len(targets),), -torch.inf)
    chosen = torch.zeros(len(targets))
    first = 0
    for piece in _pieces(variant, HEAD, states):
        total = torch.logaddexp(total, piece.logsumexp(dim=-1))
        inside = (targets >= first) & (targets < first + piece.shape[1])
        chosen[inside] = piece[inside, targets[inside] - first]
        first += piece.shape[1]
    return float((total - chosen).mean())
