"""Makes tokens of examples, and says which of them are trained.

A text is tokenised whole, as the server does it, and the trained part is found by the tokens' places in the text. Of an
answer, everything from the prompt's end to the template's end-of-turn token is trained, that token included; white
space behind it isn't, since the server never gets there.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import Any, Protocol

from manylora.training.data.example import Example
from manylora.training.data.fields import check_characters
from manylora.training.data.template import ChatTokenizer, Template, Written
from manylora.training.errors import InvalidArgument, InvalidData

IGNORED = -100
"""The label of a token that isn't trained (torch's cross-entropy passes over it)."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """An example as tokens."""

    input_ids: list[int]
    labels: list[int]
    """The token itself where it is trained, else -100. Aligned with ``input_ids``, not shifted."""
    truncated: int
    """Tokens that were cut off at the end. May leave no trained token."""
    stops: bool
    """Whether the last trained turn ends in a trained token that ends generation."""
    as_served: bool = True
    """False where the chat template writes a turn, or what is before it, otherwise than the server prompts it."""

    @property
    def trained_tokens(self) -> int:
        """How many labels are real."""
        return len(self.labels) - self.labels.count(IGNORED)


class _Encoding(Protocol):
    ids: list[int]
    offsets: list[tuple[int, int]]
    special_tokens_mask: list[int]
    """1 for tokens that the tokenizer put around the text."""


class _Backend(Protocol):
    """The part of tokenizers.Tokenizer that is used."""

    def encode_batch(self, input: list[str], *, add_special_tokens: bool) -> list[_Encoding]: ...

    def get_added_tokens_decoder(self) -> dict[int, Any]: ...

    def no_truncation(self) -> None: ...

    def no_padding(self) -> None: ...


class FastTokenizer(ChatTokenizer, Protocol):
    """The part of a transformers tokenizer that is used."""

    is_fast: bool
    backend_tokenizer: Any
    eos_token: str | None
    eos_token_id: int | None


class Renderer:
    """Renders examples with one tokenizer.

    ``stop_ids`` are the tokens that end generation with this base; without them every control token at a turn's end
    counts as one. ``system`` is put before conversations without a system turn of their own.
    Raises InvalidArgument for a tokenizer that isn't a fast one, since only those say where a token stands.
    """

    def __init__(
        self,
        tokenizer: FastTokenizer,
        max_length: int,
        *,
        system: str | None = None,
        stop_ids: Sequence[int] = (),
    ) -> None:
        if not tokenizer.is_fast:
            raise InvalidArgument(
                "the tokenizer has no tokenizer.json: only fast tokenizers can be trained with"
            )
        if max_length < 2:
            raise InvalidArgument(f"the maximum length is {max_length} tokens; it has to be at least 2")
        self._backend: _Backend = tokenizer.backend_tokenizer
        self._eos = tokenizer.eos_token
        self._max_length = max_length
        self._template = Template(tokenizer, system=system)
        added = self._backend.get_added_tokens_decoder()
        self._control = frozenset(number for number, token in added.items() if token.special)
        plain = (
            token.content for token in added.values() if token.special and not (token.lstrip or token.rstrip)
        )
        self._mark: str = next(plain, "")
        own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self._stops = frozenset((*stop_ids, *own)) if stop_ids else self._control.union(own)

    @property
    def folds_system(self) -> bool:
        """Whether system texts are put into the user's first turn, as the template takes no system turn."""
        return not self._template.takes_system

    def render(self, example: Example) -> Rendered:
        """Render one example. Raises InvalidData for one that nothing can be learnt from, naming file and line."""
        [rendered] = self.render_batch([example])
        if isinstance(rendered, InvalidData):
            raise rendered
        return rendered

    def render_batch(self, examples: Sequence[Example]) -> list[Rendered | InvalidData]:
        """Render several examples, which is faster than one after the other; errors take the places of results."""
        written = [self._write(example) for example in examples]
        chats = [one for one in written if isinstance(one, Written)]
        texts = [one for one in written if isinstance(one, str)]
        encoded_chats = iter(self._encode([chat.text for chat in chats], control_tokens=False))
        encoded_texts = iter(self._encode(texts, control_tokens=True))
        results: list[Rendered | InvalidData] = []
        for example, one in zip(examples, written, strict=True):
            if isinstance(one, Written):
                results.append(self._render_chat(one, next(encoded_chats), example))
            elif isinstance(one, str):
                results.append(self._render_text(next(encoded_texts)))
            else:
                results.append(one)
        return results

    def _write(self, example: Example) -> Written | str | InvalidData:
        if example.text is None:
            try:
                written = self._template.write(example)
                check_characters(
                    written.text, example.source
                )  # a system text comes from elsewhere than the row
            except InvalidData as error:
                return error
            return written
        if not example.text.strip():
            return InvalidData(f"{example.source}: the text is empty")
        ended = self._eos is None or example.text.endswith(self._eos)
        return example.text if ended else f"{example.text}{self._eos}"

    def _encode(self, texts: list[str], *, control_tokens: bool) -> list[_Encoding]:
        if not texts:
            return []
        # The settings of truncation and padding are shared state of the tokenizer.
        self._backend.no_truncation()
        self._backend.no_padding()
        return self._backend.encode_batch(texts, add_special_tokens=control_tokens)

    def _render_text(self, encoding: _Encoding) -> Rendered:
        ids = _without_doubles(encoding)
        kept = ids[: self._max_length]
        cut = len(ids) - len(kept)
        # Nothing stands before the first token by which it could be learnt.
        labels = [IGNORED, *kept[1:]]
        return Rendered(kept, labels, cut, stops=cut == 0 and kept[-1] in self._stops)

    def _render_chat(self, written: Written, encoding: _Encoding, example: Example) -> Rendered | InvalidData:
        tokens = self._split_at_prompts(written, _Tokens(encoding.ids, encoding.offsets))
        ids, labels = tokens.ids, [IGNORED] * len(tokens.ids)
        stops = True
        end = 0
        for span in written.spans:
            begin = tokens.first_behind(span.start)
            end = self._end_of_turn(written.text, tokens, begin, tokens.first_behind(span.end))
            labels[begin:end] = ids[begin:end]
            stops = stops and end > begin and ids[end - 1] in self._stops
        labels[0] = IGNORED
        if labels.count(IGNORED) == len(labels):
            return InvalidData(f"{example.source}: there is nothing in the assistant's messages to train on")
        kept = self._max_length
        return Rendered(
            input_ids=ids[:kept],
            labels=labels[:kept],
            truncated=max(0, len(ids) - kept),
            stops=stops and end <= kept,
            as_served=written.as_served,
        )

    def _split_at_prompts(self, written: Written, tokens: "_Tokens") -> "_Tokens":
        """Where a token would reach over a prompt's end, tokenise both sides apart.

        The server tokenises the prompt without knowing what comes: the model must go on from those tokens.
        """
        cuts = [span.start for span in written.spans if tokens.reach_over(span.start)]
        if not cuts:
            return tokens
        # SentencePiece's tokenizers put a space before a text: the mark takes it, and is taken away again.
        mark = self._mark
        borders = [0, *cuts, len(written.text)]
        pieces = [f"{mark}{written.text[start:end]}" for start, end in pairwise(borders)]
        pieces[0] = pieces[0].removeprefix(mark)
        joined = _Tokens([], [])
        for start, encoding in zip(borders, self._encode(pieces, control_tokens=False), strict=False):
            marks = 1 if start and mark else 0
            shift = start - len(mark) * marks
            joined.ids += encoding.ids[marks:]
            joined.offsets += [(first + shift, last + shift) for first, last in encoding.offsets[marks:]]
        return joined

    def _end_of_turn(self, text: str, tokens: "_Tokens", begin: int, end: int) -> int:
        """Return the index behind the control token that ends a turn; ``end`` where the template has none.

        Templates may put more behind it: a newline, or the token that ends the whole text.
        """
        found = end
        for index in range(end - 1, begin - 1, -1):
            if tokens.ids[index] in self._control or tokens.ids[index] in self._stops:
                found = index + 1
            elif not text[slice(*tokens.offsets[index])].isspace():
                break
        return found


def _without_doubles(encoding: _Encoding) -> list[int]:
    """Return a text's tokens without those that the tokenizer put around it though the text has them itself."""
    ids, added = encoding.ids, encoding.special_tokens_mask
    start = next((index for index, mark in enumerate(added) if not mark), 0)
    end = next((index for index in range(len(ids), 0, -1) if not added[index - 1]), len(ids))
    before, after = ids[:start], ids[end:]
    if before and ids[start : start + len(before)] == before:
        before = []
    if after and ids[end - len(after) : end] == after:
        after = []
    return [*before, *ids[start:end], *after]


@dataclass(slots=True)
class _Tokens:
    """Tokens with the characters that each stands for."""

    ids: list[int]
    offsets: list[tuple[int, int]]

    def first_behind(self, character: int) -> int:
        """Return the first token that ends behind a place."""
        return bisect_right(self.offsets, character, key=itemgetter(1))

    def reach_over(self, character: int) -> bool:
        """Whether a token stands for text on both sides of a place.

        Some tokenizers leave the space before a word out of the word's place: it begins where the one before ended.
        """
        index = self.first_behind(character)
        if index == len(self.ids):
            return False
        before = self.offsets[index - 1][1] if index else 0
        return min(self.offsets[index][0], before) < character
