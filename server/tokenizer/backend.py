"""The tokenizers library as it is used here, and what its tokens are in bytes."""

from typing import Any, Protocol

MOST_IDS = 1 << 22
"""Every id below the highest costs memory. The largest vocabularies have a quarter of a million tokens."""


class Encoding(Protocol):
    """A text's tokens."""

    ids: list[int]
    special_tokens_mask: list[int]
    """1 where the tokenizer put a token of its own accord."""

    def __len__(self) -> int:
        """Count the tokens."""
        ...


class Backend(Protocol):
    """The part of tokenizers.Tokenizer that is used.

    Its ``encode`` and ``decode`` hold the interpreter lock all the while (a second for a megabyte), so that
    neither the event loop nor the engine could go on; the batch forms release it.
    """

    decoder: Any
    normalizer: Any

    def encode_batch_fast(self, input: list[str], *, add_special_tokens: bool) -> list[Encoding]:
        """Tokenise, without keeping where in the text a token stands."""
        ...

    def decode_batch(self, sequences: list[list[int]], *, skip_special_tokens: bool) -> list[str]:
        """Turn ids into text."""
        ...

    def get_vocab(self, *, with_added_tokens: bool) -> dict[str, int]:
        """Return every token's id."""
        ...

    def get_added_tokens_decoder(self) -> dict[int, Any]:
        """Return the added tokens by id."""
        ...

    def to_str(self) -> str:
        """Return what a tokenizer.json would hold."""
        ...

    def no_truncation(self) -> None:
        """Never cut a text."""
        ...

    def no_padding(self) -> None:
        """Never fill one up."""
        ...


_NO_BYTE = 0xFFFF
"""A character that Latin-1 hasn't."""


def normalizer_shrinks_by(backend: Backend) -> int | None:
    """How many times shorter than a text its normalised form can be, in characters; None: unknown.

    NFC makes one character of at most three (a Hangul syllable, a letter with two marks) in what text is made
    of, four in some Greek letters.
    """
    if backend.normalizer is None:
        return 1
    return 4 if type(backend.normalizer).__name__ == "NFC" else None


def pieces_of(backend: Backend) -> list[bytes]:
    """Return every token's bytes, by the kind of decoder that the tokenizer has. b"" where an id is nobody's.

    Raises ValueError for ids of MOST_IDS and more.
    """
    added = backend.get_added_tokens_decoder()
    # With holes in the vocabulary ids go further than their number.
    ids = backend.get_vocab(with_added_tokens=True)
    size = 1 + max([*ids.values(), *added], default=-1)
    if size > MOST_IDS:
        raise ValueError(f"its token ids go up to {size - 1:,}; at most {MOST_IDS:,} ids are read")
    kinds = "" if backend.decoder is None else backend.decoder.__getstate__().decode()
    alphabet = _byte_level_alphabet() if '"ByteLevel"' in kinds else None
    names: list[str | None] = [None] * size
    for name, token_id in ids.items():
        names[token_id] = name
    for token_id, token in added.items():  # goes before another token of its id
        names[token_id] = str(token.content)
    pieces = []
    for token_id, spelled in enumerate(names):
        if spelled is None:
            pieces.append(b"")
        elif alphabet is not None:
            pieces.append(_byte_level(spelled, alphabet))
        elif token_id in added:
            pieces.append(spelled.encode())
        else:
            pieces.append(_sentencepiece(spelled))
    return pieces


def _byte_level_alphabet() -> dict[int, int]:
    """Map the codes of GPT-2's printable characters to the bytes they stand for: printable Latin-1 is itself, the rest
    from U+0100. Other characters under U+0100 stand for none."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    stand_for = {0x100 + i: byte for i, byte in enumerate(others)}
    return {byte: byte for byte in printable} | dict.fromkeys(others, _NO_BYTE) | stand_for


def _byte_level(token: str, alphabet: dict[int, int]) -> bytes:
    try:
        return token.translate(alphabet).encode("latin-1")
    except UnicodeEncodeError:  # an added token with characters outside the alphabet stands for itself
        return token.encode()


def _sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
