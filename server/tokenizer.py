"""The base model's tokenizer and chat template: text to ids, messages to ids, ids to text and bytes.

The one place that imports transformers' tokenizers. Every method may be called from several threads at
once: after loading nothing is changed, and truncation and padding, whose settings are shared state, are
switched off for good.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from manylora.server.errors import InvalidRequest

MAX_TEMPLATE_CHARACTERS = 256 * 1024
"""Length of a chat template that an adapter may bring."""
MAX_RENDERED_CHARACTERS = 16 * 1024 * 1024
"""Length of a rendered prompt; longer is refused before it is tokenised."""

_TEMPLATE_FAULTS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)

_GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")

Message = Mapping[str, Any]  # a chat message is the client's JSON: templates may look at any field of it


class TooManyTokens(Exception):
    """A text has more tokens than were asked for. ``count`` is exact or, with ``at_least``, a lower bound."""

    def __init__(self, count: int, *, at_least: bool) -> None:
        super().__init__(f"{'at least ' if at_least else ''}{count} tokens")
        self.count = count
        self.at_least = at_least


class _Encoding(Protocol):
    ids: list[int]

    def __len__(self) -> int: ...


class _Backend(Protocol):
    """The part of tokenizers.Tokenizer that is used.

    Its ``encode`` and ``decode`` hold the interpreter lock all the while (a second for a megabyte), so that
    neither the event loop nor the engine could go on; the batch forms release it.
    """

    decoder: Any
    normalizer: Any

    def encode_batch_fast(self, input: list[str], *, add_special_tokens: bool) -> list[_Encoding]: ...

    def decode_batch(self, sequences: list[list[int]], *, skip_special_tokens: bool) -> list[str]: ...

    def id_to_token(self, id: int) -> str | None: ...

    def get_vocab_size(self, *, with_added_tokens: bool) -> int: ...

    def get_added_tokens_decoder(self) -> dict[int, Any]: ...

    def no_truncation(self) -> None: ...

    def no_padding(self) -> None: ...


def _loader(path: Path) -> Any:
    """The class that reads a folder's tokenizer.

    A folder that names the generic class says that tokenizer.json is all there is to it. AutoTokenizer overrules that
    for some families: it would give every qwen2 Qwen's own way of splitting words, whatever the file has.
    """
    config = path / "tokenizer_config.json"
    named = json.loads(config.read_text()).get("tokenizer_class") if config.is_file() else None
    return PreTrainedTokenizerFast if named in _GENERIC_CLASSES else AutoTokenizer


class Tokenizer:
    """A model's tokenizer, read from ``path`` (a folder in Hugging Face's layout). Is a TokenDecoder.

    Raises ValueError if the folder holds no fast tokenizer.
    """

    def __init__(self, path: str | Path) -> None:
        self._outer = _loader(Path(path)).from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
        backend = getattr(self._outer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"{path} has no tokenizer.json: only fast tokenizers are served")
        self._backend = cast(_Backend, backend)
        self._backend.no_truncation()
        self._backend.no_padding()
        self.eos_ids = _eos_ids(Path(path), self._outer.eos_token_id)
        self._special = frozenset(
            token_id for token_id, token in self._backend.get_added_tokens_decoder().items() if token.special
        )
        self._pieces = _pieces(self._backend)
        self._bytes = [b"" if i in self._special else piece for i, piece in enumerate(self._pieces)]
        self._shrinks_by = _normalizer_shrinks_by(self._backend)
        self._longest = max(map(len, self._pieces))
        self.strips_first_space = self._probe_first_space()

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer knows, control tokens included; the model's own vocabulary may be padded
        beyond."""
        return len(self._pieces)

    @property
    def has_chat_template(self) -> bool:
        """Whether the base model brings a chat template."""
        return bool(self._outer.chat_template)

    def encode(self, text: str, *, add_special_tokens: bool = True, at_most: int | None = None) -> list[int]:
        """Tokenise a completion's prompt; by default with the tokens (bos) that the model puts around a text.

        Control tokens that are spelled out in the text are parsed as such, as is usual in the field.
        Raises TooManyTokens over ``at_most``, without tokenising a text whose length alone says so.
        """
        if at_most is not None and (least := self.least_tokens(text)) > at_most:
            raise TooManyTokens(least, at_least=True)
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        if at_most is not None and len(encoding) > at_most:
            raise TooManyTokens(len(encoding), at_least=False)
        return encoding.ids

    def least_tokens(self, text: str) -> int:
        """Return a lower bound of the tokens that ``text`` has, from its length; 0 where nothing is known."""
        if self._shrinks_by is None:
            return 0
        # UTF-8 has at least a byte a character; what is ASCII no normaliser that we know shortens.
        shrinks = 1 if text.isascii() else self._shrinks_by
        return len(text) // (self._longest * shrinks)

    def render(
        self,
        messages: Sequence[Message],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """Write the messages out by the chat template, in transformers' sandboxed Jinja.

        ``chat_template`` (an adapter's) replaces the model's; it is code from outside: the sandbox keeps it
        from the process and its length and output are bounded, its running time is not.
        Raises InvalidRequest naming ``messages`` when there is no template, or it refuses them.
        """
        self._check_template(chat_template)
        try:
            text = self._outer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        # A template is a program over what the client sent: these are what it raises if they don't suit.
        except _TEMPLATE_FAULTS as error:
            raise InvalidRequest(
                f"the chat template refuses these messages: {error}", param="messages"
            ) from error
        if len(text) > MAX_RENDERED_CHARACTERS:
            raise InvalidRequest(
                f"the rendered messages have {len(text)} characters, "
                f"at most {MAX_RENDERED_CHARACTERS} are allowed",
                param="messages",
            )
        return cast(str, text)

    def _check_template(self, chat_template: str | None) -> None:
        if chat_template is None and not self.has_chat_template:
            raise InvalidRequest(
                "the model has no chat template: use /v1/completions, or an adapter that brings one",
                param="messages",
            )
        if chat_template is not None and len(chat_template) > MAX_TEMPLATE_CHARACTERS:
            raise InvalidRequest(
                f"the adapter's chat template has {len(chat_template)} characters, at most "
                f"{MAX_TEMPLATE_CHARACTERS} are allowed",
                param="messages",
            )

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        at_most: int | None = None,
    ) -> list[int]:
        """Render the messages (see ``render``) and tokenise the result whole (see ``encode``).

        The template writes bos itself, so no tokens are added. Control tokens are parsed wherever they stand,
        in a user's text too: that is what vLLM and others do; a front end that must prevent it has to filter
        what users send.
        """
        text = self.render(
            messages,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        return self.encode(text, add_special_tokens=False, at_most=at_most)

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text, special tokens left out."""
        [text] = self._backend.decode_batch([list(ids)], skip_special_tokens=True)
        return text

    def token_text(self, token_id: int) -> str:
        """Return a single token as text for logprobs: control tokens by name, broken characters as U+FFFD."""
        return self.raw_bytes(token_id).decode("utf-8", "replace")

    def raw_bytes(self, token_id: int) -> bytes:
        """Return the token's exact bytes for logprobs, control tokens spelled out; b"" for an unknown id."""
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else b""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that the token adds to the text: b"" for special and unknown tokens."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def _probe_first_space(self) -> bool:
        for token_id, piece in enumerate(self._bytes):
            if piece.startswith(b" ") and piece[1:].isalpha():
                return not self.decode([token_id]).startswith(" ")
        return False


def _eos_ids(path: Path, tokenizers_own: int | None) -> frozenset[int]:
    """Ids that end a text: generation_config.json's, or config.json's where there is none, and the tokenizer's."""
    found = set() if tokenizers_own is None else {tokenizers_own}
    files = (path / name for name in ("generation_config.json", "config.json"))
    file = next((file for file in files if file.is_file()), None)
    if file is not None:
        listed = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        found |= set(listed) if isinstance(listed, list) else set() if listed is None else {listed}
    return frozenset(found)


def _normalizer_shrinks_by(backend: _Backend) -> int | None:
    """How many times shorter than a text its normalised form can be, in characters; None: unknown.

    NFC makes one character of at most three (a Hangul syllable, a letter with two marks) in what text is made
    of, four in some Greek letters.
    """
    if backend.normalizer is None:
        return 1
    return 4 if type(backend.normalizer).__name__ == "NFC" else None


def _pieces(backend: _Backend) -> list[bytes]:
    """Return every token's bytes, by the kind of decoder that the tokenizer has."""
    added = backend.get_added_tokens_decoder()
    size = max([backend.get_vocab_size(with_added_tokens=True), *(token_id + 1 for token_id in added)])
    kinds = "" if backend.decoder is None else backend.decoder.__getstate__().decode()
    by_character = _byte_level_alphabet() if '"ByteLevel"' in kinds else None
    pieces = []
    for token_id in range(size):
        token = backend.id_to_token(token_id)
        if token is None:
            pieces.append(b"")
        elif by_character is not None:
            pieces.append(_byte_level(token, by_character))
        elif token_id in added:
            pieces.append(token.encode())
        else:
            pieces.append(_sentencepiece(token))
    return pieces


def _byte_level_alphabet() -> dict[str, int]:
    """Map GPT-2's printable characters to the bytes they stand for: printable Latin-1 is itself, the rest
    from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _byte_level(token: str, by_character: dict[str, int]) -> bytes:
    try:
        return bytes(by_character[character] for character in token)
    except KeyError:  # an added token with characters outside the alphabet stands for itself
        return token.encode()


def _sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
