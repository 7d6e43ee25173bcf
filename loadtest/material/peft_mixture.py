"""A mixture by peft: the parts' factors side by side as one adapter, or what each part adds alone, summed.

What ours are held against.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

_NAME = "mixture"


@contextmanager
def mixed(model: PeftModel, parts: Sequence[tuple[str, float]]) -> Iterator[PeftModel]:
    """Give the model with the (name, weight) parts, which it has loaded, as its one active adapter; then forget that.

    ``add_weighted_adapter(combination_type="cat")``: A holds weight · scale · Aᵢ, B the Bᵢ, for all modules that any
    part targets. So the new scale must be 1, and is, as alpha is the new rank; but peft keeps the first part's
    use_rslora, by which it would be √rank. It is set to 1 here.
    """
    names, weights = [name for name, _ in parts], [weight for _, weight in parts]
    model.add_weighted_adapter(names, weights, _NAME, combination_type="cat")
    for module in model.modules():
        if isinstance(module, LoraLayer) and _NAME in module.scaling:
            module.scaling[_NAME] = 1.0
    model.set_adapter(_NAME)
    try:
        yield model.eval()
    finally:
        model.set_adapter(names[0])  # peft warns when the active one is deleted
        model.delete_adapter(_NAME)


@contextmanager
def summed(model: PeftModel, parts: Sequence[tuple[str, float]]) -> Iterator[PeftModel]:
    """Give the model in which each layer adds weight · (what it gives with a part alone less the base's); forget that.

    For parts that peft can't put side by side: DoRA, whose scaling of the base isn't in the factors.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.forward = _sum(layer, parts)
    try:
        yield model.eval()
    finally:
        for layer in layers:
            del layer.forward
        model.set_adapter(parts[0][0])


def _sum(layer: Any, parts: Sequence[tuple[str, float]]) -> Callable[[Tensor], Tensor]:
    alone = layer.forward

    def forward(x: Tensor) -> Tensor:
        base: Tensor = layer.base_layer(x)
        total = base
        for name, weight in parts:
            if name in layer.lora_A:
                layer.set_adapter(name)
                total = total + weight * (alone(x) - base)
        return total

    return forward
