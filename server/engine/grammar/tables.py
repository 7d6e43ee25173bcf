"""A tokenizer as the grammar library needs it: each token's bytes in a tree, and how texts are usually cut."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Tables:
    """A tokenizer's, over the width of the model's logits."""

    native: LLTokenizer
    controls: Mapping[str, int]
    eos_id: int
    """Set in a mask of the library's where the text may end. May be no id of the model's."""
    forces: bool
    """Whether it is known how a text is usually cut into tokens: where the text is certain, the next token is too."""

    @classmethod
    def of(cls, tokens: TokenSet, vocab_size: int) -> "Tables":
        """Build a tokenizer's tables: a second or so for 100,000 tokens, the interpreter's lock in hand in two goes."""
        eos_id = min((token_id for token_id in tokens.eos_ids if token_id < vocab_size), default=vocab_size)
        pieces = _Pieces(tokens, vocab_size, eos_id)
        # The library's type for it lists no callables of one's own, which it takes.
        bare = LLTokenizer(pieces, n_vocab=vocab_size + 1, slices=[])  # type: ignore[arg-type]
        native = bare.with_slices(LLTokenizer.general_slices())
        return cls(native, tokens.control_tokens, eos_id, forces=tokens.cut is not None)


class _Pieces:
    """A tokenizer as the library asks for one."""

    is_tokenizer_wrapper = True

    def __init__(self, tokens: TokenSet, vocab_size: int, eos_id: int) -> None:
        pieces = [bytes(piece) for piece in tokens.pieces[:vocab_size]]
        pieces += [b""] * (vocab_size - len(pieces))
        controls = {token_id for token_id in tokens.control_tokens.values() if token_id < vocab_size}
        self.tokens = [*pieces, EXTRA.encode()]
        self.special_token_ids = sorted({*controls, vocab_size})
        self.eos_token_id = eos_id
        self.bos_token_id = None
        self._cut = tokens.cut
        self._of_byte = {piece[0]: token_id for token_id, piece in enumerate(pieces) if len(piece) == 1}

    def __call__(self, text: str | bytes) -> list[int]:
        """Cut a text, which is asked for where tokens are forced; byte by byte where that is ruled out."""
        if self._cut is not None:
            return list(self._cut(text if isinstance(text, str) else text.decode()))
        raw = text.encode() if isinstance(text, str) else text
        return [self._of_byte[byte] for byte in raw if byte in self._of_byte]
