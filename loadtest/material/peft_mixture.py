"""A mixture as peft makes it: the parts' factors side by side, as one adapter. What ours are held against."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from peft import PeftModel
from peft.tuners.lora import LoraLayer

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
