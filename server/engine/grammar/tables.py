"""A tokenizer as the grammar library needs it: each token's bytes in a tree, and how texts are usually cut."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llguidance import LLTokenizer

log = logging.getLogger(__name__)
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
    written: Callable[[], str] | None = None
    """Returns its tokenizer.json, if it may be read in this process."""


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
        """Build a tokenizer's tables: a second or so for 100,000 tokens, the interpreter's lock in hand."""
        eos_id = min((token_id for token_id in tokens.eos_ids if token_id < vocab_size), default=vocab_size)
        if tokens.written is not None and eos_id < vocab_size and len(tokens.pieces) <= vocab_size:
            try:
                native = LLTokenizer(tokens.written(), n_vocab=vocab_size + 1, eos_token=eos_id)
                return cls(native, tokens.control_tokens, eos_id, forces=True)
            except Exception as error:
                log.warning("grammars know this tokenizer's tokens, and not how it cuts a text: %s", error)
        return cls(_by_bytes(tokens, vocab_size, eos_id), tokens.control_tokens, eos_id, forces=False)


class _Pieces:
    """A tokenizer of which nothing but its tokens' bytes is known, as the library asks for one."""

    is_tokenizer_wrapper = True

    def __init__(self, tokens: TokenSet, vocab_size: int, eos_id: int) -> None:
        pieces = [bytes(piece) for piece in tokens.pieces[:vocab_size]]
        pieces += [b""] * (vocab_size - len(pieces))
        controls = {token_id for token_id in tokens.control_tokens.values() if token_id < vocab_size}
        self.tokens = [*pieces, EXTRA.encode()]
        self.special_token_ids = sorted({*controls, vocab_size})
        self.eos_token_id = eos_id
        self.bos_token_id = None
        self._of_byte = {piece[0]: token_id for token_id, piece in enumerate(pieces) if len(piece) == 1}

    def __call__(self, text: str | bytes) -> list[int]:
        """Cut a text byte by byte: it is asked for where tokens are forced, which grammars for it rule out."""
        raw = text.encode() if isinstance(text, str) else text
        return [self._of_byte[byte] for byte in raw if byte in self._of_byte]


def _by_bytes(tokens: TokenSet, vocab_size: int, eos_id: int) -> LLTokenizer:
    return LLTokenizer(_Pieces(tokens, vocab_size, eos_id), n_vocab=vocab_size + 1)  # type: ignore[arg-type]
