"""A mixture by peft: the parts' factors side by side as one adapter, or what each part adds alone, summed.

What ours are held against.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from manylora.loadtest.material.quiet import advice_off

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


def merged_sum(model: Any, parts: Iterable[tuple[Any, float]]) -> Any:
    """Return transformers' model with W + Σ wᵢ ΔWᵢ everywhere, ΔWᵢ being what peft's i-th model changes.

    For parts of every kind but activated ones. peft's models are merged by this, one after the other.
    """
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    total = {name: tensor.clone() for name, tensor in own.items()}
    for adapted, weight in parts:
        merged = _merged(adapted)
        total = {name: tensor + weight * (merged[name] - own[name]) for name, tensor in total.items()}
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    found = type(model)(config).to(model.device).eval()
    found.load_state_dict(total)
    found.generation_config = model.generation_config
    return found


@torch.inference_mode()
def _merged(adapted: Any) -> dict[str, Tensor]:
    """Return the weights that peft computes with. Its merge into a matrix that is embedding and head changes both."""
    embedding, head = adapted.get_input_embeddings(), adapted.get_output_embeddings()
    size, wide = head.weight.shape
    device = head.weight.device
    own = {
        "model.embed_tokens.weight": embedding(torch.arange(size, device=device)).clone(),
        "lm_head.weight": head(torch.eye(wide, device=device)).T.clone(),
    }
    with advice_off():
        merged: dict[str, Tensor] = adapted.merge_and_unload().state_dict()
    return {**merged, **own}


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
