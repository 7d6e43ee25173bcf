"""A grammar as it was asked for: a value, which says nothing of any tokenizer and is compiled elsewhere."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum


class GrammarKind(Enum):
    """In what a grammar is written."""

    JSON_SCHEMA = "json_schema"
    """JSON Schema, as JSON."""
    REGEX = "regex"
    """A regular expression that the whole text matches: Rust's syntax, without lookaround and back references."""
    LARK = "lark"
    """llguidance's dialect of Lark: `%json {…}` is a schema inside it, `<name>` a control token."""
    EBNF = "ebnf"
    """That, or llama.cpp's GBNF: the text tells which."""


class GrammarRefused(Exception):
    """A grammar that can't be held, with what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What a text must be. Equal grammars are compiled once for a tokenizer."""

    kind: GrammarKind
    text: str
    after: str | None = None
    """A text or a control token (`</think>`) after which it begins: all up to it is free, but for that it must come,
    and up to two line ends may follow it. None: it begins at once."""
    param: str = field(default="response_format", compare=False)
    """The request's field that asked for it."""

    @classmethod
    def of_choices(cls, choices: Sequence[str], param: str) -> "Grammar":
        """Return the grammar of a text that is one of these, none of which is empty."""
        spelled = (json.dumps(choice, ensure_ascii=False) for choice in dict.fromkeys(choices))
        return cls(GrammarKind.LARK, f"start: {' | '.join(spelled)}", param=param)
