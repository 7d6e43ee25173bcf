"""Everything that a search for a learning rate touches, kept and put back: weights, random states, the model's mode."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from manylora.training.random_states import RandomStates


@contextmanager
def each_from_here(model: nn.Module) -> Iterator["Start"]:
    """Yield the state now, for several trials that shall all start from it; it is there again at the end."""
    was_training = model.training
    start = Start(model)
    try:
        yield start
    finally:
        start.again()
        model.train(was_training)


class Start:
    """A state to start trials from."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._weights = {
            name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad
        }
        self._states = RandomStates.now()

    def again(self) -> None:
        """Make the state what it was."""
        with torch.no_grad():
            for name, each in self._model.named_parameters():
                if each.requires_grad:
                    each.copy_(self._weights[name])
                    each.grad = None
        self._states.put_back()
