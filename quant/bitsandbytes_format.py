"""NF4 matrices as bitsandbytes writes them to safetensors: codes, absmax, a JSON of the rest as bytes."""

import json
from dataclasses import dataclass

import torch

from quant.checkpoint import Checkpoint
from quant.errors import CorruptCheckpoint, UnsupportedQuantization
from quant.nf4 import NF4_CODE, NestedScales, Nf4Tensor

STATE = "weight.quant_state.bitsandbytes__"


@dataclass(frozen=True, slots=True)
class _State:
    shape: tuple[int, int]
    blocksize: int
    nested_blocksize: int | None
    nested_offset: float | None


def read_nf4(checkpoint: Checkpoint, path: str) -> tuple[Nf4Tensor, set[str]]:
    """Read the matrix of module ``path`` and return it with the tensor names that it took."""
    state_name = f"{path}.{STATE}nf4"
    names = checkpoint.names()
    if state_name not in names:
        other = next((name for name in names if name.startswith(f"{path}.{STATE}")), None)
        if other is not None:
            raise UnsupportedQuantization(
                f"{path} is in bitsandbytes {other.rpartition('__')[2]}; NF4 is served"
            )
        raise CorruptCheckpoint(f"{path}: {state_name!r} is missing")
    state = _parse(checkpoint, state_name)
    tensors = {
        suffix: checkpoint.read(f"{path}.{suffix}")
        for suffix in ("weight", "weight.absmax", "weight.quant_map")
    }
    taken = {f"{path}.{suffix}" for suffix in tensors} | {state_name}
    if not torch.equal(tensors["weight.quant_map"].float(), NF4_CODE):
        raise UnsupportedQuantization(f"{path}.weight.quant_map is not NF4's")
    absmax: torch.Tensor | NestedScales = tensors["weight.absmax"]
    if state.nested_blocksize is not None and state.nested_offset is not None:
        nested = {suffix: checkpoint.read(f"{path}.{suffix}") for suffix in NESTED}
        taken |= {f"{path}.{suffix}" for suffix in NESTED}
        absmax = NestedScales(
            tensors["weight.absmax"],
            nested["weight.nested_absmax"],
            nested["weight.nested_quant_map"],
            torch.tensor(state.nested_offset),
            state.nested_blocksize,
        )
    return Nf4Tensor(
        tensors["weight"].view(torch.uint8).view(-1), absmax, state.shape, state.blocksize
    ), taken


NESTED = ("weight.nested_absmax", "weight.nested_quant_map")


def _parse(checkpoint: Checkpoint, name: str) -> _State:
    try:
        state = json.loads(bytes(checkpoint.read(name).tolist()))
        out, wide = state["shape"]
        nested = state.get("nested_blocksize")
        return _State((out, wide), state["blocksize"], nested, state.get("nested_offset"))
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpoint(f"{name!r} is not a quantisation state: {error}") from None
