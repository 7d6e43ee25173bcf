"""Which matrices of which layer an adapter is on, and with what rank. Counts, no bytes."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from manylora.training.errors import InvalidArgument
from manylora.training.memory.run_shape import RunShape
from manylora.training.memory.shape import ModelShape

_FIRST_QWEN_PATHS = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
_PATHS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


@dataclass(frozen=True, slots=True)
class Adapted:
    """A matrix with LoRA."""

    name: str
    inputs: int
    outputs: int
    rank: int

    @property
    def values(self) -> int:
        """Values of both factors."""
        return self.rank * (self.inputs + self.outputs)


def adapted_layers(model: ModelShape, run: RunShape) -> Mapping[tuple[Adapted, ...], int]:
    """Return the adapted matrices of a layer, and how many layers have just these.

    A target is a name, or a path as PEFT's exclusions leave it. Raises InvalidArgument for one that no layer has.
    """
    return _adapted_layers(model, run.targets, run.rank, run.rank_pattern)


def factor_values(model: ModelShape, run: RunShape) -> int:
    """Return the values in all factors."""
    layers = adapted_layers(model, run)
    return sum(count * sum(each.values for each in layer) for layer, count in layers.items())


def adapted_outputs(model: ModelShape, run: RunShape) -> int:
    """Return the rows of all adapted matrices: DoRA trains a length for each."""
    layers = adapted_layers(model, run)
    return sum(count * sum(each.outputs for each in layer) for layer, count in layers.items())


def unused_ranks(model: ModelShape, run: RunShape) -> tuple[str, ...]:
    """Return the keys of the rank pattern that no adapted matrix takes its rank from."""
    without = _adapted_layers(model, run.targets, 1, ())
    return tuple(
        key
        for key, rank in run.rank_pattern
        if _adapted_layers(model, run.targets, 1, ((key, rank + 1),)) == without
    )


@lru_cache(maxsize=128)
def _adapted_layers(
    model: ModelShape, targets: tuple[str, ...], rank: int, pattern: tuple[tuple[str, int], ...]
) -> Mapping[tuple[Adapted, ...], int]:
    paths = tuple(each for each in targets if "." in each)
    named = tuple(each for each in targets if "." not in each)
    names = {name for name, _, _ in model.adapted(named)} if named or not paths else set()
    missing = set(paths)
    layers: Counter[tuple[Adapted, ...]] = Counter()
    for index in range(model.num_layers):
        layer = []
        for path, (name, inputs, outputs) in zip(_paths(model, index), model.matrices(), strict=True):
            meant = {each for each in paths if path == each or path.endswith(f".{each}")}
            missing -= meant
            if meant or name in names:
                layer.append(Adapted(name, inputs, outputs, _rank(path, rank, pattern)))
        layers[tuple(layer)] += 1
    if missing:
        raise InvalidArgument(f"no layer of this {model.family} model has {', '.join(sorted(missing))}.")
    return layers


def _paths(model: ModelShape, index: int) -> tuple[str, ...]:
    """Return the paths of a layer's matrices, in ModelShape.matrices' order."""
    if model.family == "qwen":
        return tuple(f"transformer.h.{index}.{each}" for each in _FIRST_QWEN_PATHS)
    return tuple(f"model.layers.{index}.{each}" for each in _PATHS)


def _rank(path: str, rank: int, pattern: tuple[tuple[str, int], ...]) -> int:
    """Return the rank at a path, as PEFT looks it up (peft.utils.other.get_pattern_key): the first key that matches."""
    return next((own for key, own in pattern if re.match(rf"(.*\.)?({key})$", path)), rank)
