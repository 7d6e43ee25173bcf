"""Which tokens an activated adapter (aLoRA, arXiv 2504.12397) is to act from: by text or ids, or as one that is there.

From where on it acts in each row is training/data/activation.py's.
"""

from collections.abc import Sequence

from manylora.training.bases.settings import LoraSettings
from manylora.training.bases.types import Base
from manylora.training.errors import InvalidArgument

LONGEST = 256
"""Tokens of an invocation that the server takes."""


def invocation_of(lora: LoraSettings, base: Base, string: str | None, ids: Sequence[int]) -> tuple[int, ...]:
    """Return the adapter's own invocation, or what is asked for by text or ids. Raises InvalidArgument."""
    asked = _asked(base, string, ids)
    if lora.invocation and asked not in ((), lora.invocation):
        raise InvalidArgument(
            f"the invocation {list(asked)} differs from that of the adapter to start from, {list(lora.invocation)}:"
            " leave it out"
        )
    return lora.invocation or asked


def _asked(base: Base, string: str | None, ids: Sequence[int]) -> tuple[int, ...]:
    if string is None and not ids:
        return ()
    if string is not None and ids:
        raise InvalidArgument(
            "--alora_invocation_string and --alora_invocation_tokens say the same: give one of them"
        )
    found = tuple(ids) if string is None else tuple(base.tokenizer.encode(string, add_special_tokens=False))
    if not found or len(found) > LONGEST:
        raise InvalidArgument(f"an invocation has 1 to {LONGEST} tokens, not {len(found)}: {string!r}")
    size = base.model.get_input_embeddings().weight.shape[0]
    wrong = [each for each in found if not 0 <= each < size]
    if wrong:
        raise InvalidArgument(
            f"--alora_invocation_tokens has {wrong[0]}, but the base has {size} tokens, ids 0 to {size - 1}"
        )
    return found
