"""Everything that a search for a learning rate touches, kept and put back: weights, random states, the model's mode."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def put_back_after(model: nn.Module) -> Iterator[None]:
    """Leave trained weights, gradients, random states and the model's mode as they were, whatever happens inside."""
    was_training = model.training
    kept = _trained(model)
    states = _random_states()
    try:
        yield
    finally:
        _put_back(model, kept)
        _set_random_states(states)
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
        self._states = _random_states()

    def again(self) -> None:
        """Make the state what it was."""
        _put_back(self._model, self._weights)
        _set_random_states(self._states)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}


def _put_back(model: nn.Module, kept: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, each in model.named_parameters():
            if each.requires_grad:
                each.copy_(kept[name])
                each.grad = None


_States = tuple[object, object, Tensor, list[Tensor]]


def _random_states() -> _States:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _set_random_states(states: _States) -> None:
    python, numpy, cpu, cuda = states
    random.setstate(python)  # type: ignore[arg-type]  # what getstate gave
    np.random.set_state(numpy)  # type: ignore[arg-type]
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
