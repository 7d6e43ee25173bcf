"""An example's text as the check sees it: what was asked, what is answered, and forms of both for comparing."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from manylora.training.data.example import Example

_NOT_A_WORD = re.compile(r"[\W_]+")
_SPACE = re.compile(r"\s+")
_FINAL_MARKS = " .!?。！？…"


@dataclass(frozen=True, slots=True)
class RowText:
    """The parts of one row that are compared."""

    system: str
    prompt: str
    """All before the last answer but the system's words; empty for plain text."""
    answer: str
    """The last trained message, or the plain text."""
    chat: bool

    @property
    def whole(self) -> str:
        """All of it, in reading order."""
        return "\n".join(part for part in (self.system, self.prompt, self.answer) if part)


def content_of(message: Mapping[str, object]) -> str:
    """Return a message's text: its string, the text of its parts, and its tool calls as JSON."""
    content = message.get("content")
    pieces: list[str] = []
    if isinstance(content, str):
        pieces.append(content)
    elif isinstance(content, Sequence):
        pieces += [str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in content]
    elif content is not None:
        pieces.append(str(content))
    if message.get("tool_calls"):
        pieces.append(json.dumps(message["tool_calls"], ensure_ascii=False, sort_keys=True, default=str))
    return "\n".join(pieces)


def row_text(example: Example) -> RowText:
    """Split an example into system, prompt and answer."""
    if example.text is not None:
        return RowText("", "", example.text, chat=False)
    roles = [str(message.get("role", "")) for message in example.messages]
    contents = [content_of(message) for message in example.messages]
    answers = [index for index, trained in enumerate(example.trained) if trained]
    last = answers[-1] if answers else len(roles)
    system = "\n".join(contents[i] for i in range(last) if roles[i] == "system")
    prompt = "\n".join(contents[i] for i in range(last) if roles[i] != "system")
    return RowText(system, prompt, contents[last] if answers else "", chat=True)


def fingerprint(*parts: str) -> int:
    """A 64-bit hash of strings in order; 0 is left free to mean "none"."""
    digest = blake2b(digest_size=8)
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass"))
        digest.update(b"\x1f")
    return int.from_bytes(digest.digest(), "little") or 1


def words_only(text: str) -> str:
    """The text in small letters with every run of what is no letter or digit made one space."""
    return _NOT_A_WORD.sub(" ", text.casefold()).strip()


def lenient(text: str) -> str:
    """The text without differences of case, space and final marks: what makes two answers the same answer."""
    return _SPACE.sub(" ", text.casefold()).strip().rstrip(_FINAL_MARKS)
