"""Log probabilities in the shapes of OpenAI's two APIs."""

from collections.abc import Sequence

from server.engine.request import TokenLogprobs
from server.tokenizer import Tokenizer


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


def completion_logprobs(
    ids: Sequence[int], tokens: Sequence[TokenLogprobs | None], tokenizer: Tokenizer, offset: int
) -> dict[str, object]:
    """Return ``choices[].logprobs`` of a completion: parallel lists; None where nothing predicts a token.

    ``offset``: characters of the text before the first of these tokens.
    """
    texts = [tokenizer.token_text(token_id) for token_id in ids]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [None if token is None else token.logprob for token in tokens],
        "top_logprobs": [None if token is None else _alternatives(token, tokenizer) for token in tokens],
        "text_offset": offsets,
    }


def _alternatives(token: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, float]:
    found: dict[str, float] = {}
    # Several ids may spell the same text: the likeliest keeps the key. The chosen token is always there.
    for token_id, logprob in (*token.top, (token.token_id, token.logprob)):
        found.setdefault(tokenizer.token_text(token_id), logprob)
    return found


def _token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, object]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": logprob,
        "bytes": list(tokenizer.raw_bytes(token_id)),
    }
