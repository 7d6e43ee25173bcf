"""Filling in the middle: the tokens by which models that were trained for it are told what stands before and behind.

Which they are the tokenizer tells: each family has names of its own. Orders are those that the models were trained on
first: prefix, suffix, middle (2207.14255, PSM).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Names:
    """How a family spells them."""

    prefix: str
    suffix: str
    middle: str
    ends: tuple[str, ...] = ()
    """What else ends a middle, where the tokenizer has it."""


FAMILIES = (
    # Qwen2.5 and its coders, CodeGemma
    Names(
        "<|fim_prefix|>",
        "<|fim_suffix|>",
        "<|fim_middle|>",
        ("<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>"),
    ),
    # StarCoder, Granite's coders
    Names(
        "<fim_prefix>",
        "<fim_suffix>",
        "<fim_middle>",
        ("<|endoftext|>", "<fim_pad>", "<file_sep>", "<repo_name>"),
    ),
    # DeepSeek Coder: the suffix follows the hole
    Names("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", ("<｜end▁of▁sentence｜>", "<|EOT|>")),
    # Code Llama
    Names("▁<PRE>", "▁<SUF>", "▁<MID>", ("▁<EOT>",)),
)


@dataclass(frozen=True, slots=True)
class Middle:
    """The tokens of a tokenizer."""

    prefix: int
    suffix: int
    middle: int
    ends: frozenset[int]
    """That end what is filled in, and are no part of it."""

    def around(self, before: Sequence[int], behind: Sequence[int]) -> list[int]:
        """Return the prompt that asks for what stands between two texts, given as their tokens."""
        return [self.prefix, *before, self.suffix, *behind, self.middle]


def middle_of(id_of: Callable[[str], int | None]) -> Middle | None:
    """Return the tokens of a tokenizer, by the ids that it has for names; None: it knows no family's."""
    for names in FAMILIES:
        prefix, suffix, middle = (id_of(name) for name in (names.prefix, names.suffix, names.middle))
        if prefix is None or suffix is None or middle is None:
            continue
        others = {token_id for name in names.ends if (token_id := id_of(name)) is not None}
        return Middle(prefix, suffix, middle, frozenset({prefix, suffix, middle} | others))
    return None
