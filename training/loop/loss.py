"""The loss: cross-entropy of trained tokens. The head is run only where a trained token is predicted.

At a vocabulary of 150,000 the logits are most of what a token costs, and the prompt's are never looked at.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100
"""The label of a token that is not trained."""


def predicting(labels: Tensor) -> Tensor:
    """Return where a trained token is predicted: bool [B, T], true at t where ``labels`` [B, T] trains t + 1."""
    found = torch.zeros_like(labels, dtype=torch.bool)
    found[:, :-1] = labels[:, 1:] != IGNORED
    return found


@contextmanager
def head_only_at(model: nn.Module, positions: Tensor) -> Iterator[None]:
    """Have the head read the hidden states at ``positions`` (bool [B, T], N of them) alone: logits become [N, V]."""

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][positions], *args[1:])

    handle = _head(model).register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def _head(model: nn.Module) -> nn.Module:
    inner: Any = getattr(model, "module", model)  # what DDP wraps: a PreTrainedModel, or peft's around one
    head = inner.get_output_embeddings()
    assert isinstance(head, nn.Module), "a causal language model has an output embedding"
    return head


def token_losses(
    model: nn.Module, inputs: Mapping[str, Tensor], label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return every trained token's cross-entropy, float32 [N], and the row that it is in, int64 [N].

    ``inputs`` are a collator's: input_ids and labels [B, T], attention_mask or position_ids.
    """
    labels = inputs["labels"]
    positions = predicting(labels)
    rest: dict[str, Any] = {name: value for name, value in inputs.items() if name != "labels"}
    if "activated_at" in rest:
        # peft counts from the end, padding included; 0 is nowhere.
        places, width = rest.pop("activated_at")[:, 0].tolist(), labels.shape[1]
        rest["alora_offsets"] = [width - place if place >= 0 else 0 for place in places]
        _forget_hooks(model)
    with head_only_at(model, positions):
        logits: Tensor = model(**rest, use_cache=False).logits
    targets = labels[:, 1:][positions[:, :-1]]
    losses = F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=label_smoothing)
    return losses, positions.nonzero()[:, 0]


def _forget_hooks(model: nn.Module) -> None:
    """Take off what peft leaves on checkpointed layers for a backward pass that never came.

    There is none where a loss is only measured, or where memory ran out; peft refuses the next forward pass then.
    """
    for layer in model.modules():
        hooks: list[Any] = getattr(layer, "_peft_gradient_checkpointing_forward_hooks", [])
        while hooks:
            hooks.pop().remove()


def trained_token_loss(
    model: nn.Module, inputs: Mapping[str, Tensor], label_smoothing: float = 0.0
) -> tuple[Tensor, int]:
    """Return the sum of the trained tokens' cross-entropies, a float32 scalar, and how many they are."""
    losses, _ = token_losses(model, inputs, label_smoothing)
    return losses.sum(), losses.numel()
