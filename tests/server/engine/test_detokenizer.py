"""Detokenizer: whole characters only, and in the end the text that decoding everything at once gives."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from manylora.server.engine.detokenizer import Detokenizer


class Bytes:
    """Token i is byte i; 256 is special."""

    strips_first_space = False

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""


class Spaced(Bytes):
    strips_first_space = True


def _pieces(ids: Sequence[int], prompt: Sequence[int] = (), decoder: Bytes | None = None) -> list[str]:
    detokenizer = Detokenizer(decoder or Bytes(), prompt)
    return [detokenizer.push(i) for i in ids] + [detokenizer.flush()]


@given(st.text())
def test_text_comes_through_a_byte_at_a_time(text: str) -> None:
    pieces = _pieces(list(text.encode()))
    assert "".join(pieces) == text
    assert all(len(piece) <= 1 for piece in pieces)


@given(st.lists(st.integers(0, 256)))
def test_any_bytes_come_out_as_if_decoded_at_once(ids: list[int]) -> None:
    assert "".join(_pieces(ids)) == bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def test_a_half_character_waits_and_is_flushed_as_replacement() -> None:
    assert _pieces(list("🦙".encode())[:3]) == ["", "", "", "\ufffd"]


def test_a_literal_replacement_character_is_text() -> None:
    assert "".join(_pieces(list("a\ufffdb".encode()))) == "a\ufffdb"


def test_a_character_that_the_prompt_began_is_finished() -> None:
    whole = list("né".encode())
    assert "".join(_pieces(whole[-1:], whole[:-1])) == "é"


def test_the_tokenizer_s_own_first_space_goes_only_at_the_start_of_the_text() -> None:
    assert "".join(_pieces(list(b" a b"), [256], Spaced())) == "a b"
    assert "".join(_pieces(list(b" a b"), list(b"x"), Spaced())) == " a b"
    assert "".join(_pieces([256, *b" a"], [], Spaced())) == "a"
