"""NF4 matrices as bitsandbytes writes them to safetensors: codes, absmax, a JSON of the rest as bytes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.quant.checkpoint import Checkpoint
from manylora.quant.errors import CorruptCheckpoint, UnsupportedQuantization
from manylora.quant.nf4 import NF4_CODE, NestedScales, Nf4Tensor

STATE = "weight.quant_state.bitsandbytes__"
PLAIN = ("weight", "weight.absmax", "weight.quant_map")
NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)
}


@dataclass(frozen=True, slots=True)
class _State:
    shape: tuple[int, int]
    blocksize: int
    nested_blocksize: int | None
    nested_offset: float

    @property
    def blocks(self) -> int:
        return -(-self.shape[0] * self.shape[1] // self.blocksize)


def read_nf4(checkpoint: Checkpoint, path: str) -> tuple[Nf4Tensor, set[str]]:
    """Read the matrix of module ``path`` and return it with the tensor names that it took."""
    state_name = _state_name(checkpoint, path)
    state = _parse(checkpoint, state_name)
    suffixes = PLAIN if state.nested_blocksize is None else PLAIN + NESTED
    tensors = {suffix: checkpoint.read(f"{path}.{suffix}") for suffix in suffixes}
    _check(path, tensors, state)
    absmax: Tensor | NestedScales = tensors["weight.absmax"]
    if state.nested_blocksize is not None:
        absmax = NestedScales(
            tensors["weight.absmax"],
            tensors["weight.nested_absmax"],
            tensors["weight.nested_quant_map"],
            torch.tensor(state.nested_offset),
            state.nested_blocksize,
        )
    codes = tensors["weight"].view(torch.uint8).view(-1)
    matrix = Nf4Tensor(codes, absmax, state.shape, state.blocksize)
    return matrix, {f"{path}.{suffix}" for suffix in suffixes} | {state_name}


def _state_name(checkpoint: Checkpoint, path: str) -> str:
    start = f"{path}.{STATE}"
    found = next((name for name in sorted(checkpoint.names()) if name.startswith(start)), None)
    if found is None:
        raise CorruptCheckpoint(f"{checkpoint.directory}: tensor '{start}nf4' is missing")
    if found != f"{start}nf4":
        raise UnsupportedQuantization(
            f"{path} is in bitsandbytes {found.removeprefix(start)}, which is not served; NF4 is"
        )
    return found


def _parse(checkpoint: Checkpoint, name: str) -> _State:
    try:
        state = json.loads(bytes(checkpoint.read(name).tolist()))
        out, wide = (int(size) for size in state["shape"])
        nested = state.get("nested_blocksize")
        return _State(
            (out, wide),
            int(state["blocksize"]),
            None if nested is None else int(nested),
            0.0 if nested is None else float(state["nested_offset"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"{name!r} is not a quantisation state: {error!r}") from None


def _check(path: str, tensors: Mapping[str, Tensor], state: _State) -> None:
    """Hold each tensor's type and size against what the state says."""
    # bitsandbytes can store the codes in words of another type (bnb_4bit_quant_storage): bytes are what counts.
    expected = {"weight": (tensors["weight"].dtype, -(-state.shape[0] * state.shape[1] // 2))}
    if state.nested_blocksize is None:
        expected["weight.absmax"] = torch.float32, state.blocks
    else:
        expected["weight.absmax"] = torch.uint8, state.blocks
        expected["weight.nested_absmax"] = torch.float32, -(-state.blocks // state.nested_blocksize)
        expected["weight.nested_quant_map"] = torch.float32, 256
    for suffix, (dtype, count) in expected.items():
        tensor = tensors[suffix]
        found = tensor.nbytes if suffix == "weight" else tensor.numel()
        if tensor.dtype != dtype or found != count:
            raise CorruptCheckpoint(
                f"{path}.{suffix} is {tensor.dtype} {list(tensor.shape)}, "
                f"but the state of a {list(state.shape)} matrix says {dtype} [{count}]"
            )
    if not torch.equal(tensors["weight.quant_map"].float(), NF4_CODE):
        raise UnsupportedQuantization(f"{path}.weight.quant_map is not NF4's")
