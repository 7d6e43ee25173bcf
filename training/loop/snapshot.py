"""The last good state of what is trained, kept in memory: where a run that diverged goes back to."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Copies of the trained parameters and of the optimiser's state, on the host."""

    step: int
    values: dict[str, Tensor]
    states: dict[int, dict[str, object]]
    """By the parameter's position among the optimiser's."""

    @classmethod
    def take(cls, step: int, model: nn.Module, optimizer: Optimizer) -> "Snapshot":
        """Copy the state at the border after ``step``."""
        states = {
            index: {
                key: _copy(value) if isinstance(value, Tensor) else value
                for key, value in optimizer.state.get(each, {}).items()
            }
            for index, each in enumerate(_parameters(optimizer))
        }
        return cls(step, _values(model), states)

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """Have the trained parameters be what they were, for a while; gradients stay."""
        now = _values(model)
        _set(model, self.values)
        try:
            yield
        finally:
            _set(model, now)

    def put_back(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Make the trained parameters and the optimiser's state what they were. Gradients are dropped."""
        _set(model, self.values)
        for parameter in model.parameters():
            parameter.grad = None
        for index, each in enumerate(_parameters(optimizer)):
            saved = self.states[index]
            if not saved:
                optimizer.state.pop(each, None)
                continue
            state = optimizer.state[each]
            for key, value in saved.items():
                state[key] = value.to(state[key].device, copy=True) if isinstance(value, Tensor) else value


def slow_down(optimizer: Optimizer, scheduler: object, factor: float) -> None:
    """Multiply every group's learning rate, now and in what the scheduler will set."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * factor
        if "initial_lr" in group:
            group["initial_lr"] = group["initial_lr"] * factor
    rates = getattr(scheduler, "base_lrs", None)
    if rates is not None:
        rates[:] = [rate * factor for rate in rates]


def _values(model: nn.Module) -> dict[str, Tensor]:
    return {name: _copy(each) for name, each in model.named_parameters() if each.requires_grad}


@torch.no_grad()
def _set(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(values[name])


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [each for group in optimizer.param_groups for each in group["params"]]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
