"""The text of one model as the API needs it: the base's, or an adapter's that brings a tokenizer of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from manylora.server.errors import InvalidRequest
from manylora.server.tokenizer.lane import Lane
from manylora.server.tokenizer.vocabulary import Vocabulary

SpecialTokens = Mapping[str, str | list[str]]
"""Names of special tokens (bos_token, …) as chat templates read them."""


class Codec(Protocol):
    """Makes tokens of texts and texts of tokens, off the event loop; in the lane, if it is done in this process."""

    async def encode(
        self, lane: Lane, texts: Sequence[str], *, add_special_tokens: bool, at_most: int
    ) -> list[list[int]]:
        """Tokenise texts. Raises TooManyTokens for the first over ``at_most``, InvalidRequest and QueueFull."""
        ...

    async def spell(self, lane: Lane, ids: Sequence[int]) -> str:
        """Turn ids into text, control tokens spelled out."""
        ...


@dataclass(frozen=True, slots=True)
class ModelText:
    """What a model's texts are made with."""

    codec: Codec
    vocabulary: Vocabulary
    special_tokens: SpecialTokens = field(repr=False)
    eos_ids: frozenset[int]
    """Ids that end an answer."""
    fingerprint: str = ""
    """Of the tokenizer: equal for those that make the same tokens of every text."""
    own_size: int | None = None
    """Ids of the model, if they are another number than the base's."""

    def differs_in(self, other: "ModelText") -> str | None:
        """Say in what prompts or ends of answers are made otherwise than by ``other``; None: in nothing.

        Special tokens that neither a prompt nor an end is made with (pad_token, …) may differ.
        """
        if self.fingerprint != other.fingerprint:
            return "tokenizers"
        for kind in ("bos_token", "eos_token"):
            if self.special_tokens.get(kind) != other.special_tokens.get(kind):
                return f"tokenizers: {kind} is {self.special_tokens.get(kind)!r} and {other.special_tokens.get(kind)!r}"
        return None if self.eos_ids == other.eos_ids else "tokenizers: other tokens end an answer"

    def stops(self, stops: Sequence[str]) -> dict[int, str]:
        """Return the control tokens among stop strings, by id: they have no text to be found by.

        Raises InvalidRequest for a stop string that goes on beyond a control token: it would never be found.
        """
        controls = self.vocabulary.control_tokens
        for stop in stops:
            part = next((name for name in controls if name in stop and name != stop), None)
            if part is not None and stop not in controls:
                raise InvalidRequest(
                    f"stop: {stop!r} holds the control token {part!r}, which has no text: give the token alone, "
                    "it is found by its id",
                    param="stop",
                )
        return {controls[stop]: stop for stop in stops if stop in controls}
