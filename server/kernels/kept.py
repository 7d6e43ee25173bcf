"""Prepared weights as plain tensors and facts about them: what a backend writes down of them, and reads back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from manylora.server.kernels.weights import LinearWeight

Facts: TypeAlias = Mapping[str, Any]
"""What JSON can say."""


@dataclass(frozen=True, slots=True)
class Apart:
    """A prepared matrix, taken apart."""

    facts: Facts
    tensors: Mapping[str, Tensor]


class Keeper(Protocol):
    """Takes apart what a backend prepared, and puts it together again without preparing it anew."""

    @property
    def layout(self) -> str:
        """All that prepared weights depend on beside the checkpoint and its quantization, in a few words.

        Processor, layout and options: weights of another layout are another backend's.
        """
        ...

    def take_apart(self, weight: object) -> Apart:
        """Return a matrix or an embedding of this backend as tensors, which share its memory."""
        ...

    def put_together(self, apart: Apart) -> LinearWeight:
        """Return the matrix or embedding; it shares the tensors' memory, which is only read.

        Raises ValueError where they are none: nothing that is out of bounds may reach a kernel.
        """
        ...
