"""Grammars over a vocabulary of bytes, and texts held against them."""

import json
from functools import cache

from manylora.loadtest.material.random_schemas import byte_vocabulary
from manylora.server.engine.grammar import (
    CompiledGrammar,
    Grammar,
    GrammarFault,
    GrammarKind,
    GrammarRefused,
    Standing,
    Tables,
    TokenSet,
)

PIECES, CONTROLS, END = byte_vocabulary()
TOKENS = TokenSet("bytes", PIECES, CONTROLS, frozenset({END}))


@cache
def tables() -> Tables:
    return Tables.of(TOKENS, len(PIECES))


def compiled(kind: GrammarKind, text: str, after: str | None = None) -> CompiledGrammar:
    return CompiledGrammar(Grammar(kind, text, after), tables())


def of_schema(schema: object) -> CompiledGrammar:
    return compiled(GrammarKind.JSON_SCHEMA, json.dumps(schema))


def accepts(grammar: CompiledGrammar, text: str) -> bool:
    """Say whether a text is one of the grammar's, from end to end."""
    matcher = grammar.matcher((), 0)
    try:
        for byte in text.encode():
            if matcher.take(byte) is Standing.ENDS:
                return False
    except GrammarFault:
        return False
    return matcher.may_end


def refusal(kind: GrammarKind, text: str) -> str:
    """Return what is said of a grammar that is refused; "" if it is taken."""
    try:
        compiled(kind, text)
    except GrammarRefused as refused:
        return str(refused)
    return ""
