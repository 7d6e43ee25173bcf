"""A grammar as it was asked for: a value, which says nothing of any tokenizer and is compiled elsewhere."""

import re
from dataclasses import dataclass
from enum import Enum


class GrammarKind(Enum):
    """In what a grammar is written."""

    JSON_SCHEMA = "json_schema"
    """JSON Schema, as JSON."""
    REGEX = "regex"
    """A regular expression that the whole text matches: Rust's syntax, without lookaround and back references."""
    LARK = "lark"
    """llguidance's dialect of Lark: `%json {…}` is a schema inside it, `<name>` a control token."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a text must be. Equal grammars are compiled once for a tokenizer."""

    kind: GrammarKind
    text: str
    after: str | None = None
    """A text or a control token (`</think>`) after which it begins: all up to it is free, but for that it must come.
    None: it begins at once."""

    @classmethod
    def of_choices(cls, choices: list[str]) -> "Grammar":
        """Return the grammar of a text that is one of these."""
        return cls(GrammarKind.REGEX, "|".join(map(re.escape, choices)))
