"""The optimiser's parameter groups: weight decay where it belongs, and LoRA+ (2402.12354), a larger rate for B."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypedDict

from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel


class ParameterGroup(TypedDict):
    """What torch's optimisers take."""

    params: list[nn.Parameter]
    lr: float
    weight_decay: float


def lora_parameter_groups(
    model: "PeftModel", learning_rate: float, weight_decay: float, loraplus_lr_ratio: float | None = None
) -> list[ParameterGroup]:
    """Return the trained parameters in groups, none of them empty.

    Biases, DoRA's magnitudes and norms (what has one dimension) don't decay. With ``loraplus_lr_ratio`` (LoRA+'s λ,
    16 in its paper) B learns at that multiple of the rate; all else, embeddings and head too, at the plain one.
    """
    ratio = 1.0 if loraplus_lr_ratio is None else loraplus_lr_ratio
    sorted_out: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in _trained(model):
        decay = weight_decay if parameter.ndim > 1 else 0.0
        rate = learning_rate * ratio if ".lora_B." in name else learning_rate
        sorted_out.setdefault((rate, decay), []).append(parameter)
    return [
        ParameterGroup(params=parameters, lr=rate, weight_decay=decay)
        for (rate, decay), parameters in sorted_out.items()
    ]


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
