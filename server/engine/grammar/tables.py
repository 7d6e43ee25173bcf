"""A tokenizer as the grammar library needs it: each token's bytes in a tree, and how texts are usually cut."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLTokenizer

EXTRA = "<|no token|>"
"""Ends a text for the library where the tokenizer has no token that does: an id beyond the model's."""


@dataclass(frozen=True, slots=True)
class TokenSet:
    """What tables are made of."""

    key: str
    """Equal for tokenizers that make the same tokens of every text."""
    pieces: Sequence[bytes]
    """Each token's bytes, by id."""
    control_tokens: Mapping[str, int]
    """Tokens that are no text, by how they are spelled."""
    eos_ids: frozenset[int]
    cut: Callable[[str], Sequence[int]] | None = None
    """Cuts a text as it stands into tokens, on any thread; None: that isn't known in this process."""
    own_size: int | None = None
    """Ids of the model, if they are another number than the base's."""


@dataclass(frozen=True, slots=True)
class Tables:
    """A tokenizer's, over the width of the model's logits."""

    native: "LLTokenizer"
    controls: Mapping[str, int]
    vocab_size: int
    eos_id: int
    """Set in a mask of the library's where the text may end. May be no id of the model's."""
    forces: bool
    """Whether it is known how a text is usually cut into tokens: where the text is certain, the next token is too."""

    @classmethod
    def of(cls, tokens: TokenSet, vocab_size: int) -> "Tables":
        """Build a tokenizer's tables: a second or so for 100,000 tokens, the interpreter's lock in hand in two goes."""
        from llguidance import LLTokenizer

        eos_id = min((token_id for token_id in tokens.eos_ids if token_id < vocab_size), default=vocab_size)
        pieces = _Pieces(tokens, vocab_size, eos_id)
        # The library's type for it lists no callables of one's own, which it takes.
        bare = LLTokenizer(pieces, n_vocab=vocab_size + 1, slices=[])  # type: ignore[arg-type]
        native = bare.with_slices(LLTokenizer.general_slices())
        return cls(native, tokens.control_tokens, vocab_size, eos_id, forces=tokens.cut is not None)


class _Pieces:
    """A tokenizer as the library asks for one."""

    is_tokenizer_wrapper = True

    def __init__(self, tokens: TokenSet, vocab_size: int, eos_id: int) -> None:
        pieces = [bytes(piece) for piece in tokens.pieces[:vocab_size]]
        pieces += [b""] * (vocab_size - len(pieces))
        controls = {token_id for token_id in tokens.control_tokens.values() if token_id < vocab_size}
        self.tokens = [*pieces, EXTRA.encode()]
        self._controls = controls
        self.special_token_ids = sorted({*controls, vocab_size})
        self.eos_token_id = eos_id
        self.bos_token_id = None
        self._cut = tokens.cut
        self._of_byte = {piece[0]: token_id for token_id, piece in enumerate(pieces) if len(piece) == 1}

    def __call__(self, text: str | bytes) -> list[int]:
        """Cut a text, which is asked for where tokens are forced; byte by byte where the tokenizer can't.

        A tokenizer may make another text of it, or take what spells a control token for one. The library goes on
        behind what it asked for, so it needs tokens that spell that, or its beginning.
        """
        raw = text.encode() if isinstance(text, str) else text
        if self._cut is not None:
            ids = list(self._cut(raw.decode()))
            known = all(
                token_id < len(self.tokens) - 1 and token_id not in self._controls for token_id in ids
            )
            if known and b"".join([self.tokens[token_id] for token_id in ids]) == raw:
                return ids
        return [self._of_byte[byte] for byte in takewhile(self._of_byte.__contains__, raw)]
