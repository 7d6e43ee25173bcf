"""A LoRA layer's A and B made of slices, each a parameter of its own, so that a rank can grow while an optimiser runs.

To peft they are what it put there: modules with a ``weight``, whose state has the one key ``weight``. Growing adds rows
to A and zero columns to B: the layer's output stays the same to the last bit, because every slice of A keeps its own
matmul (a matmul over more rows may add up in another order) and zero columns of B add zeros.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from manylora.training.errors import InvalidArgument

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer


class _Sliced(nn.Module):
    """One matrix kept as slices along ``axis``, the rank."""

    axis: int

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        # Not in a ParameterList: a child would have a state of its own beside ``weight``.
        self.register_parameter("slice_0", weight)

    @property
    def slices(self) -> tuple[nn.Parameter, ...]:
        """The slices, from the first one on."""
        return tuple(self.parameters(recurse=False))

    @property
    def weight(self) -> Tensor:
        """The whole matrix; gradients flow into the slices."""
        slices = self.slices
        return slices[0] if len(slices) == 1 else torch.cat(slices, self.axis)

    @property
    def ranks(self) -> list[int]:
        """The rank of each slice."""
        return [part.shape[self.axis] for part in self.slices]

    def append(self, values: Tensor) -> None:
        """Add a slice, with the first one's dtype and device."""
        first, count = self.slices[0], len(self.slices)
        part = nn.Parameter(values.to(first.device, first.dtype), requires_grad=first.requires_grad)
        self.register_parameter(f"slice_{count}", part)

    def pop(self) -> None:
        """Take the last slice away."""
        delattr(self, f"slice_{len(self.slices) - 1}")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        if key not in state_dict:
            missing_keys.append(key)
            return
        values: Tensor = state_dict[key]
        if values.shape != self.weight.shape:
            error_msgs.append(f"{key} is {tuple(values.shape)}, expected {tuple(self.weight.shape)}")
            return
        with torch.no_grad():
            for part, value in zip(self.slices, torch.split(values, self.ranks, self.axis), strict=True):
                part.copy_(value)


class SlicedA(_Sliced):
    """A, [rank, in]: slices of rows."""

    axis = 0

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., rank], slice by slice."""
        parts = [functional.linear(x, rows) for rows in self.slices]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class SlicedB(_Sliced):
    """B, [out, rank]: slices of columns."""

    axis = 1

    def forward(self, h: Tensor) -> Tensor:
        """Map [..., rank] to [..., out], all slices in one matmul."""
        return functional.linear(h, self.weight)


class SlicedLayer:
    """One LoRA layer of a model, with its A and B made growable. Raises InvalidArgument for one that can't be."""

    def __init__(self, name: str, layer: "LoraLayer", adapter: str) -> None:
        self.name = name
        self._layer, self._adapter = layer, adapter
        if adapter not in layer.lora_A:
            raise InvalidArgument(
                f"--rank_schedule can't grow {name}, which isn't a linear layer; leave it out of --lora_target_modules."
            )
        a, b = layer.lora_A[adapter], layer.lora_B[adapter]
        if getattr(b, "bias", None) is not None:
            raise InvalidArgument(
                f"--rank_schedule can't grow {name}, whose lora_B has a bias; train without it."
            )
        self.a, self.b = SlicedA(a.weight), SlicedB(b.weight)
        layer.lora_A[adapter], layer.lora_B[adapter] = self.a, self.b

    def grow(self, rank: int, alpha: float, rows: Tensor) -> None:
        """Take ``rows`` [rank − old rank, in] into A and zeros into B; ``alpha`` / ``rank`` must be the old scale."""
        out_features = self.b.slices[0].shape[0]
        self.a.append(rows)
        self.b.append(torch.zeros(out_features, rows.shape[0]))
        self._set_rank(rank, alpha)

    def shrink(self, rank: int, alpha: float) -> None:
        """Take the last slice away again."""
        for half in (self.a, self.b):
            half.pop()
        self._set_rank(rank, alpha)

    def _set_rank(self, rank: int, alpha: float) -> None:
        # The scale itself is left alone: computed anew, it could differ in its last bit.
        self._layer.r[self._adapter] = rank
        self._layer.lora_alpha[self._adapter] = alpha


def slice_layers(model: "PeftModel") -> list[SlicedLayer]:
    """Make every LoRA layer of the active adapter growable, in the model's order. Raises InvalidArgument."""
    from peft.tuners.lora import LoraLayer

    adapter = model.active_adapter
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    return [
        SlicedLayer(name, layer, adapter)
        for name, layer in layers
        if adapter in layer.lora_A or adapter in layer.lora_embedding_A
    ]


def kaiming_rows(count: int, old: Tensor, generator: torch.Generator) -> Tensor:
    """Draw rows as peft draws a fresh A: uniform within ±1/√in. ``old`` is the A [rank, in] that they are for."""
    bound = 1 / math.sqrt(old.shape[1])
    return (torch.rand(count, old.shape[1], generator=generator) * 2 - 1) * bound


def orthogonal_rows(count: int, old: Tensor, generator: torch.Generator) -> Tensor:
    """Draw rows at right angles to A's and to each other, of a fresh row's mean length, 1/√3.

    Where the input has fewer dimensions left than rows are asked for, the rest are Kaiming's.
    """
    drawn = kaiming_rows(count, old, generator)
    free = max(0, min(count, old.shape[1] - old.shape[0]))
    taken, _ = torch.linalg.qr(old.detach().double().cpu().T)
    residual = drawn[:free].double()
    residual = residual - residual @ taken @ taken.T
    directions, _ = torch.linalg.qr(residual.T)
    return torch.cat([(directions.T / math.sqrt(3)).to(drawn.dtype), drawn[free:]])


def alpha_at(rank: int, initial_rank: int, initial_alpha: float, *, rslora: bool) -> float:
    """Return the alpha that keeps the scale at a grown rank: α·r'/r, with rsLoRA α·√(r'/r)."""
    alpha = initial_alpha * math.sqrt(rank / initial_rank) if rslora else initial_alpha * rank / initial_rank
    return int(alpha) if alpha == int(alpha) else alpha
