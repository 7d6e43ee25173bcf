"""Turns a sequence's tokens into text as they come, whole characters only.

It works on the bytes that each token stands for, so a token costs O(1) and nothing is decoded twice. It knows
no tokenizer: server/tokenizer/ says what the bytes are.
"""

import codecs
from collections.abc import Sequence
from typing import Protocol

_WARM_UP = 8
"""Prompt tokens that are enough to know whether the prompt ends inside a character (4 bytes at most)."""


class TokenDecoder(Protocol):
    """What a token stands for."""

    @property
    def strips_first_space(self) -> bool:
        """Whether a text's first space is the tokenizer's own (SentencePiece's dummy prefix) and not text."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes that the token adds to running text; b"" for special and unknown tokens."""
        ...


class Detokenizer:
    """Decodes one sequence's output, continuing the prompt.

    What it emits in all is decode(prompt + output) without decode(prompt). A malformed byte sequence becomes
    U+FFFD, one for each maximal part (as in the Unicode standard and in byte-level BPE's own decoding).
    """

    def __init__(self, decoder: TokenDecoder, prompt_ids: Sequence[int]) -> None:
        self._decoder = decoder
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        pieces = [decoder.token_bytes(token_id) for token_id in prompt_ids[-_WARM_UP:]]
        self._utf8.decode(b"".join(pieces))
        self._at_start = decoder.strips_first_space and not any(
            decoder.token_bytes(token_id) for token_id in prompt_ids
        )

    def push(self, token_id: int) -> str:
        """Take the next output token; return the characters that it completed."""
        piece = self._decoder.token_bytes(token_id)
        if self._at_start and piece:
            self._at_start = False
            piece = piece.removeprefix(b" ")
        return self._utf8.decode(piece)

    def flush(self) -> str:
        """End the text: return U+FFFD for a character that was left unfinished, else nothing."""
        return self._utf8.decode(b"", final=True)
