"""Log probabilities in OpenAI's two shapes, of tokens that no real model need produce."""

import math
from typing import Any

from manylora.server.api.logprobs import CompletionLogprobs, chat_logprobs
from manylora.server.engine.request import TokenLogprobs


class Pieces:
    """A vocabulary whose ids are places in a list of bytes."""

    def __init__(self, *pieces: bytes, strips_first_space: bool = False) -> None:
        self._pieces = pieces
        self.strips_first_space = strips_first_space

    def token_text(self, token_id: int) -> str:
        return self._pieces[token_id].decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return self._pieces[token_id]

    raw_bytes = token_bytes
    around = (0, 0)


def lists(vocabulary: Pieces, *tokens: TokenLogprobs | None) -> dict[str, list[Any]]:
    ids = [0 if token is None else token.token_id for token in tokens]
    return CompletionLogprobs(vocabulary).of(ids, tokens)  # type: ignore[arg-type]


def test_a_probability_of_zero_is_openais_number_and_not_infinity() -> None:
    never = TokenLogprobs(0, -math.inf, ((1, -0.5), (0, -math.inf)))
    found = lists(Pieces(b"a", b"b"), never)
    assert found["token_logprobs"] == [-9999.0]
    assert found["top_logprobs"] == [{"b": -0.5, "a": -9999.0}]
    chat = chat_logprobs([never], Pieces(b"a", b"b"))  # type: ignore[arg-type]
    assert chat == {
        "content": [
            {
                "token": "a",
                "logprob": -9999.0,
                "bytes": [97],
                "top_logprobs": [
                    {"token": "b", "logprob": -0.5, "bytes": [98]},
                    {"token": "a", "logprob": -9999.0, "bytes": [97]},
                ],
            }
        ],
        "refusal": None,
    }


def test_the_chosen_token_is_among_the_best_and_the_likelier_of_two_with_one_text_keeps_it() -> None:
    pieces = Pieces(b"a", b"b", b"b", b"c")
    assert lists(pieces, TokenLogprobs(3, -9.0, ((0, -0.1),)))["top_logprobs"] == [{"a": -0.1, "c": -9.0}]
    both = TokenLogprobs(0, -0.1, ((0, -0.1), (1, -2.0), (2, -3.0)))
    assert lists(pieces, both)["top_logprobs"] == [{"a": -0.1, "b": -2.0}]


def test_offsets_count_characters_and_a_characters_later_bytes_begin_where_it_does() -> None:
    pieces = Pieces(b"ab", "é".encode()[:1], "é".encode()[1:], b"c")
    tokens = [TokenLogprobs(token_id, -1.0) for token_id in range(4)]
    assert lists(pieces, *tokens)["text_offset"] == [0, 2, 2, 3]


def test_a_first_space_that_the_text_does_not_have_is_not_counted() -> None:
    pieces = Pieces(b" ab", b" c", strips_first_space=True)
    tokens = [TokenLogprobs(0, -1.0), TokenLogprobs(1, -1.0)]
    prompt = CompletionLogprobs(pieces).of_prompt([0, 1], tokens, "ab c", added=False)  # type: ignore[arg-type]
    assert prompt["text_offset"] == [0, 2]
    assert lists(pieces, *tokens)["text_offset"] == [0, 3]


def test_nothing_predicts_the_first_token() -> None:
    found = lists(Pieces(b"a", b"b"), None, TokenLogprobs(1, -1.0, ((1, -1.0),)))
    assert found["tokens"] == ["a", "b"]
    assert (found["token_logprobs"], found["top_logprobs"]) == ([None, -1.0], [None, {"b": -1.0}])
