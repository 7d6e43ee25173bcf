"""Log probabilities in the shapes of OpenAI's two APIs."""

import codecs
from collections.abc import Sequence
from typing import Any

from manylora.server.engine.request import TokenLogprobs
from manylora.server.tokenizer import Vocabulary

LEAST = -9999.0
"""What OpenAI's API gives for a token of probability zero: JSON has no infinity."""


def chat_logprobs(tokens: Sequence[TokenLogprobs], vocabulary: Vocabulary) -> dict[str, object]:
    """Return ``choices[].logprobs`` of a chat completion: each token with its bytes and its alternatives."""
    return {"content": token_logprobs(tokens, vocabulary), "refusal": None}


def token_logprobs(tokens: Sequence[TokenLogprobs], vocabulary: Vocabulary) -> list[dict[str, object]]:
    """Return each token with its bytes and its alternatives."""
    return [
        {
            **_token(vocabulary, token.token_id, token.logprob),
            "top_logprobs": [_token(vocabulary, token_id, logprob) for token_id, logprob in token.top],
        }
        for token in tokens
    ]


class CompletionLogprobs:
    """Writes ``choices[].logprobs`` of one choice of a completion, whole or as it grows."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def of(self, ids: Sequence[int], tokens: Sequence[TokenLogprobs | None]) -> dict[str, list[Any]]:
        """Return the lists for the next ``ids``; None where nothing predicts a token."""
        return self._lists(ids, tokens, [self._vocabulary.token_bytes(token_id) for token_id in ids])

    def of_prompt(
        self, ids: Sequence[int], tokens: Sequence[TokenLogprobs | None], text: str, *, added: bool
    ) -> dict[str, list[Any]]:
        """Return the lists for a prompt that is echoed as ``text``, control tokens spelled out; before any ``of``.

        ``added``: the tokenizer put its own tokens around the text.
        """
        pieces = [self._vocabulary.raw_bytes(token_id) for token_id in ids]
        before, behind = self._vocabulary.around if added else (0, 0)
        for place in (*range(before), *range(len(ids) - behind, len(ids))):
            pieces[place] = b""
        first = next((place for place, piece in enumerate(pieces) if piece), None)
        if first is not None and self._vocabulary.strips_first_space:
            pieces[first] = pieces[first].removeprefix(b" ")
        lists = self._lists(ids, tokens, pieces)
        # A tokenizer may have changed the text (accents put together): what follows begins behind it all the same.
        self._offset = len(text)
        self._utf8.reset()
        return lists

    def _lists(
        self, ids: Sequence[int], tokens: Sequence[TokenLogprobs | None], pieces: Sequence[bytes]
    ) -> dict[str, list[Any]]:
        return {
            "tokens": [self._vocabulary.token_text(token_id) for token_id in ids],
            "token_logprobs": [None if token is None else max(token.logprob, LEAST) for token in tokens],
            "top_logprobs": [None if token is None else self._alternatives(token) for token in tokens],
            "text_offset": [self._next_offset(piece) for piece in pieces],
        }

    def _next_offset(self, piece: bytes) -> int:
        """Return at which character of the text a token begins; a character's later bytes begin where it does."""
        begins = self._offset
        self._offset += len(self._utf8.decode(piece))
        return begins

    def _alternatives(self, token: TokenLogprobs) -> dict[str, float]:
        found: dict[str, float] = {}
        # Several ids may spell the same text: the likeliest keeps the key. The chosen token is always there.
        for token_id, logprob in (*token.top, (token.token_id, token.logprob)):
            found.setdefault(self._vocabulary.token_text(token_id), max(logprob, LEAST))
        return found


def _token(vocabulary: Vocabulary, token_id: int, logprob: float) -> dict[str, object]:
    return {
        "token": vocabulary.token_text(token_id),
        "logprob": max(logprob, LEAST),
        "bytes": list(vocabulary.raw_bytes(token_id)),
    }
