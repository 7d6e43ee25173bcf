"""Token ids that clients send, held against the model's vocabulary."""

from collections.abc import Sequence

from manylora.server.errors import InvalidRequest


def check_token_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raise InvalidRequest for the first id that the vocabulary doesn't have."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
        raise InvalidRequest(f"{param}: token id {wrong} is not in 0 to {vocab_size - 1}", param=param)
