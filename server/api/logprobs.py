"""Log probabilities in the shapes of OpenAI's two APIs."""

import codecs
from collections.abc import Sequence

from manylora.server.engine.request import TokenLogprobs
from manylora.server.tokenizer import Tokenizer

LEAST = -9999.0
"""What OpenAI's API gives for a token of probability zero: JSON has no infinity."""


def chat_logprobs(tokens: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, object]:
    """Return ``choices[].logprobs`` of a chat completion: each token with its bytes and its alternatives."""
    content = [
        {
            **_token(tokenizer, token.token_id, token.logprob),
            "top_logprobs": [_token(tokenizer, token_id, logprob) for token_id, logprob in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """Writes ``choices[].logprobs`` of one choice of a completion, whole or as it grows.

    ``from_start``: whether its text begins with the prompt (echo).
    """

    def __init__(self, tokenizer: Tokenizer, *, from_start: bool) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0
        self._strip = from_start and tokenizer.strips_first_space

    def of(self, ids: Sequence[int], tokens: Sequence[TokenLogprobs | None]) -> dict[str, object]:
        """Return the lists for the next ``ids``; None where nothing predicts a token."""
        return {
            "tokens": [self._tokenizer.token_text(token_id) for token_id in ids],
            "token_logprobs": [None if token is None else max(token.logprob, LEAST) for token in tokens],
            "top_logprobs": [None if token is None else self._alternatives(token) for token in tokens],
            "text_offset": [self._next_offset(token_id) for token_id in ids],
        }

    def _next_offset(self, token_id: int) -> int:
        """Return at which character of the text a token begins; a character's later bytes begin where it does."""
        begins = self._offset
        piece = self._tokenizer.token_bytes(token_id)
        if self._strip and piece:
            piece, self._strip = piece.removeprefix(b" "), False
        self._offset += len(self._utf8.decode(piece))
        return begins

    def _alternatives(self, token: TokenLogprobs) -> dict[str, float]:
        found: dict[str, float] = {}
        # Several ids may spell the same text: the likeliest keeps the key. The chosen token is always there.
        for token_id, logprob in (*token.top, (token.token_id, token.logprob)):
            found.setdefault(self._tokenizer.token_text(token_id), max(logprob, LEAST))
        return found


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, object]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": max(logprob, LEAST),
        "bytes": list(tokenizer.raw_bytes(token_id)),
    }
