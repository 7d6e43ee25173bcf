"""The base model's tokenizer and chat template: text to ids, messages to ids, ids to text and bytes.

Every method may be called from several threads at
once: after loading nothing is changed, and truncation and padding, whose settings are shared state, are
switched off for good.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from jinja2.exceptions import TemplateError

from manylora.adapters.tokenizer import TokenizerRefused, load_tokenizer
from manylora.server.chat.render import Message, render
from manylora.server.chat.templates import MAX_RENDERED_CHARACTERS
from manylora.server.errors import InvalidRequest
from manylora.server.tokenizer.backend import Backend, normalizer_shrinks_by, pieces_of
from manylora.server.tokenizer.vocabulary import Vocabulary, added_around

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


class TooManyTokens(Exception):
    """A text has more tokens than were asked for. ``count`` is exact or, with ``at_least``, a lower bound."""

    def __init__(self, count: int, *, at_least: bool) -> None:
        super().__init__(f"{'at least ' if at_least else ''}{count} tokens")
        self.count = count
        self.at_least = at_least


class Tokenizer:
    """A model's tokenizer, read from ``path`` (a folder in Hugging Face's layout).

    Raises TokenizerRefused (a ValueError) if the folder holds none that can be read.
    """

    def __init__(self, path: str | Path) -> None:
        self._outer: Any = load_tokenizer(path)
        backend = getattr(self._outer, "backend_tokenizer", None)
        if backend is None:
            raise TokenizerRefused(f"{path} has no tokenizer.json: only fast tokenizers are served")
        self._backend = cast(Backend, backend)
        self._backend.no_truncation()
        self._backend.no_padding()
        self.eos_ids = _eos_ids(Path(path), self._outer.eos_token_id)
        self.vocabulary = _vocabulary(self._backend)
        self._shrinks_by = normalizer_shrinks_by(self._backend)
        self._longest = max(map(len, self.vocabulary.pieces))

    @property
    def vocab_size(self) -> int:
        """Ids that the tokenizer knows, control tokens included; the model's own vocabulary may be padded
        beyond."""
        return len(self.vocabulary)

    @property
    def eos_id(self) -> int | None:
        """The id of the tokenizer's own end token."""
        found: int | None = self._outer.eos_token_id
        return found

    def ids_beyond(self, vocab_size: int) -> dict[str, int]:
        """Return the tokens whose ids a model with ``vocab_size`` ids doesn't have: a text may spell them."""
        return self.vocabulary.ids_beyond(vocab_size)

    def written(self) -> str:
        """Return the tokenizer as its library writes it, a few megabytes: all that the tokens of a text depend on."""
        return self._backend.to_str()

    @cached_property
    def fingerprint(self) -> str:
        """What two tokenizers share if and only if they make the same tokens of every text."""
        return hashlib.sha256(self.written().encode()).hexdigest()

    @property
    def has_chat_template(self) -> bool:
        """Whether the base model brings a chat template."""
        return bool(self._outer.chat_template)

    @property
    def chat_template(self) -> str | None:
        """The base model's chat template, the one that ``render`` uses; None: it brings none to use by itself."""
        try:
            return self._outer.get_chat_template() if self.has_chat_template else None
        except ValueError:
            return None

    def template(self, *, tools: bool) -> str:
        """Return the chat template that ``render`` uses, with tools or without; "" if there is none."""
        try:
            found = self._outer.get_chat_template(tools=[{}] if tools else None)
        except ValueError:
            return ""
        return str(found or "")

    @property
    def special_tokens(self) -> dict[str, str | list[str]]:
        """Names of special tokens (bos_token, …) as chat templates read them."""
        found = self._outer.special_tokens_map.items()
        return {
            name: list(map(str, token)) if isinstance(token, list) else str(token) for name, token in found
        }

    def encode(self, text: str, *, add_special_tokens: bool = True, at_most: int | None = None) -> list[int]:
        """Tokenise a completion's prompt; by default with the tokens (bos) that the model puts around a text.

        Control tokens that are spelled out in the text are parsed as such, as is usual in the field.
        Raises TooManyTokens over ``at_most``, without tokenising a text whose length alone says so.
        """
        if at_most is not None:
            self.check_length(text, at_most)
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        if at_most is not None and len(encoding) > at_most:
            raise TooManyTokens(len(encoding), at_least=False)
        return encoding.ids

    def check_length(self, text: str, at_most: int) -> None:
        """Raise TooManyTokens for a text whose length alone says that it has more than ``at_most``."""
        least = self.least_tokens(text)
        if least > at_most:
            raise TooManyTokens(least, at_least=True)

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
        variables: Mapping[str, object] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """Write the messages out by the model's chat template, in this process: the operator chose it.

        ``variables`` are what else the template may read. Raises InvalidRequest naming ``messages`` when there is no
        template, or it refuses them.
        """
        if not self.has_chat_template:
            raise InvalidRequest(
                "the model has no chat template: use /v1/completions, or an adapter that brings one",
                param="messages",
            )
        try:
            text = render(
                self._outer.get_chat_template(tools=(variables or {}).get("tools")),
                messages,
                {**self.special_tokens, **(variables or {})},
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
        return text

    def apply_chat_template(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Render the messages (see ``render``) and tokenise the result, to which the template added what is needed."""
        text = self.render(messages, add_generation_prompt=add_generation_prompt)
        return self.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into text, special tokens left out."""
        [text] = self._backend.decode_batch([list(ids)], skip_special_tokens=True)
        return text

    def spell(self, ids: Sequence[int]) -> str:
        """Turn ids into text, special tokens spelled out."""
        [text] = self._backend.decode_batch([list(ids)], skip_special_tokens=False)
        return text


def _vocabulary(backend: Backend) -> Vocabulary:
    added = backend.get_added_tokens_decoder()
    pieces = pieces_of(backend)
    [encoding] = backend.encode_batch_fast(["a"], add_special_tokens=True)
    return Vocabulary(
        pieces,
        {str(token.content): token_id for token_id, token in added.items() if token.special},
        strips_first_space=_strips_first_space(backend, pieces),
        around=added_around(encoding.special_tokens_mask),
    )


def _strips_first_space(backend: Backend, pieces: Sequence[bytes]) -> bool:
    for token_id, piece in enumerate(pieces):
        if piece.startswith(b" ") and piece[1:].isalpha():
            [text] = backend.decode_batch([[token_id]], skip_special_tokens=True)
            return not text.startswith(" ")
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
