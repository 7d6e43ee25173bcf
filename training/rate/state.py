"""Everything that a search for a learning rate touches, kept and put back: weights, random states, the model's mode."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from training.random_states import RandomStates


@contextmanager
def put_back_after(model: nn.Module) -> Iterator[None]:
    """Leave trained weights, gradients, random states and the model's mode as they were, whatever happens inside."""
    was_training = model.training
    kept = _trained(model)
    states = RandomStates.now()
    try:
        yield
    finally:
        _put_back(model, kept)
        states.put_back()
        model.train(was_training)


@contextmanager
def each_from_here(model: nn.Module) -> Iterator["Start"]:
    """Yield the state now, for several trials that shall all start from it; it is there again at the end."""
    with put_back_after(model):
        yield Start(model)


class Start:
    """A state to start trials from."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._weights = _trained(model)
        self._states = RandomStates.now()

    def again(self) -> None:
        """Make the state what it was."""
        _put_back(self._model, self._weights)
        self._states.put_back()


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}


def _put_back(model: nn.Module, kept: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, each in model.named_parameters():
            if each.requires_grad:
                each.copy_(kept[name])
                each.grad = None
