"""A second module tree over the same weights, so that each task can have a PEFT model of its own on one base.

peft puts its layers into a model's tree, and everything around it (saving, rank schedules, optimiser groups) takes one
model with one adapter. A skeleton gives each task that model; none of the skeletons is ever run.
"""

from typing import TypeVar

from torch import nn

Tree = TypeVar("Tree", bound=nn.Module)


def skeleton(model: Tree) -> Tree:
    """Return ``model``'s tree anew: modules of its own, the very same parameters, buffers and quantised weights."""
    made: dict[int, nn.Module] = {}
    tree = _copied(model, made)
    assert isinstance(tree, type(model))
    return tree


def _copied(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    if id(module) in made:  # a module that hangs in two places
        return made[id(module)]
    twin = module.__class__.__new__(module.__class__)
    made[id(module)] = twin
    # Its own dictionaries of hooks, parameters and modules, so that what is put in here isn't put in there.
    twin.__dict__ = {
        name: value.copy() if isinstance(value, dict) else value for name, value in vars(module).items()
    }
    children = twin.__dict__["_modules"]
    for name, child in children.items():
        children[name] = None if child is None else _copied(child, made)
    return twin
