"""What comes out of a step of the model, before anything is sampled."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Of the step's T tokens."""

    logits: Tensor
    """float32 [n, vocab], of the tokens that were asked for."""
    finite: Tensor
    """bool [T]: whether what the token wrote to the KV cache, in each layer, and its last hidden state are finite.
    What is not must be neither read again nor sampled from."""
