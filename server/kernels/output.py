"""What a step gives back, once it is waited for."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from manylora.server.kernels.sampling import Sampled


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What comes out of the model."""

    logits: Tensor
    """float32 [n, vocab], of the tokens that were asked for; [0, vocab] where these were sampled without them."""
    finite: Tensor
    """bool [T]: whether what the token wrote to the KV cache, in each layer, and its last hidden state are finite.
    What is not must be neither read again nor sampled from."""
    all_finite: bool = False
    """Whether it is known that all of them are."""
    sampled: Sampled | None = None
    """What was sampled of them, if that was asked for and the backend does it."""
    states: Tensor | None = None
    """float32 [k, hidden]: the normalised last hidden states of the batch's ``state_rows``; None: there are none."""
    model_seconds: float = 0.0
    """What layers and head took, measured where they ran."""
    sample_seconds: float = 0.0
    others: Mapping[int, Tensor] = field(default_factory=dict)
    """Logits, float32 [ids], of the tokens whose adapters have another number of ids than the base, by their places
    among those that were asked for; what stands in ``logits`` there is nobody's."""
