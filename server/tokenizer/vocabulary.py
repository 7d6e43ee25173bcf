"""What a tokenizer's tokens are: their bytes, their names, which of them have no text. Is a TokenDecoder."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy as np

from manylora.server.tokenizer.middle import Middle, middle_of


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """All tokens of a tokenizer. After it is made nothing of it changes; any thread may read it."""

    pieces: Sequence[bytes]
    """Each token's exact bytes, control tokens spelled out."""
    control_tokens: Mapping[str, int]
    """Tokens that have no text, by how they are spelled."""
    strips_first_space: bool
    """Whether a text's first space is the tokenizer's own (SentencePiece's dummy prefix) and not text."""
    around: tuple[int, int] = (0, 0)
    """How many tokens it puts before and behind a text of its own accord."""
    _texts: list[bytes] = field(init=False)
    _middle: list[Middle | None] = field(init=False, default_factory=list, repr=False, compare=False)
    """Looked up once it is asked for."""

    def __post_init__(self) -> None:
        # A look-up is made for every token of every stream.
        texts = list(self.pieces)
        for token_id in self.control_tokens.values():
            texts[token_id] = b""
        object.__setattr__(self, "_texts", texts)

    def __len__(self) -> int:
        """Count the ids, up to the last one that has a token."""
        return len(self.pieces)

    def raw_bytes(self, token_id: int) -> bytes:
        """Return the token's exact bytes, control tokens spelled out; b"" for an unknown id."""
        return self.pieces[token_id] if 0 <= token_id < len(self.pieces) else b""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that the token adds to the text: b"" for control and unknown tokens."""
        return self._texts[token_id] if 0 <= token_id < len(self._texts) else b""

    def spelling(self, marks: Iterable[str]) -> "Vocabulary | Spelling":
        """Return what decodes as this does, but spells out those control tokens that are among ``marks``."""
        spelled = {self.control_tokens[mark]: mark.encode() for mark in marks if mark in self.control_tokens}
        return Spelling(self, spelled) if spelled else self

    def token_text(self, token_id: int) -> str:
        """Return a single token as text for logprobs: control tokens by name, broken characters as U+FFFD."""
        return self.raw_bytes(token_id).decode("utf-8", "replace")

    def id_of(self, token: str) -> int | None:
        """Return the id of a token by how it is spelled; None if there is none such. Looks at all of them."""
        found = self.control_tokens.get(token)
        if found is None and (piece := token.encode("utf-8", "surrogatepass")) in self.pieces:
            return self.pieces.index(piece)
        return found

    @property
    def middle(self) -> Middle | None:
        """By which tokens its models are asked to fill in a middle; None: they aren't."""
        if not self._middle:
            self._middle.append(middle_of(self.id_of))
        return self._middle[0]

    def ids_beyond(self, vocab_size: int) -> dict[str, int]:
        """Return the tokens whose ids a model with ``vocab_size`` ids doesn't have: a text may spell them."""
        beyond = range(vocab_size, len(self.pieces))
        return {self.token_text(token_id): token_id for token_id in beyond if self.pieces[token_id]}

    def to_bytes(self) -> bytes:
        """Return everything in a form that another process reads without ado."""
        head = {
            "control_tokens": dict(self.control_tokens),
            "strips_first_space": self.strips_first_space,
            "around": self.around,
            "count": len(self.pieces),
        }
        ends = np.fromiter(accumulate(map(len, self.pieces)), dtype="<u4", count=len(self.pieces))
        return b"".join((json.dumps(head).encode(), b"\n", ends.tobytes(), *self.pieces))

    @classmethod
    def from_bytes(cls, raw: bytes) -> "Vocabulary":
        """Read what ``to_bytes`` wrote."""
        line, _, rest = raw.partition(b"\n")
        head = json.loads(line)
        width = 4 * head["count"]
        ends = [0, *np.frombuffer(rest[:width], dtype="<u4").tolist()]
        body = rest[width:]
        pieces = [body[start:end] for start, end in pairwise(ends)]
        before, behind = head["around"]
        return cls(pieces, head["control_tokens"], head["strips_first_space"], (before, behind))


@dataclass(frozen=True, slots=True)
class Spelling:
    """A vocabulary in which some control tokens have a text. Is a TokenDecoder."""

    vocabulary: Vocabulary
    spelled: Mapping[int, bytes]

    @property
    def strips_first_space(self) -> bool:
        """See Vocabulary."""
        return self.vocabulary.strips_first_space

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that the token adds to the text."""
        found = self.spelled.get(token_id)
        return self.vocabulary.token_bytes(token_id) if found is None else found


def added_around(mask: Iterable[int]) -> tuple[int, int]:
    """Return how many tokens stand before and behind a text, of the mask that is 1 for tokens that were added."""
    marks = list(mask)
    before = next((i for i, mark in enumerate(marks) if not mark), len(marks))
    behind = next((i for i, mark in enumerate(reversed(marks)) if not mark), len(marks))
    return before, behind
