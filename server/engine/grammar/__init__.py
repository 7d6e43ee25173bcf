"""Grammars that answers are held to: what one is, how it is compiled, and which tokens it lets follow.

The one room that knows llguidance.
"""

from manylora.server.engine.grammar.compiled import CompiledGrammar
from manylora.server.engine.grammar.grammar import Grammar, GrammarKind, GrammarRefused
from manylora.server.engine.grammar.grammars import Grammars
from manylora.server.engine.grammar.matcher import GrammarFault, Masks, Matcher, Standing, Words
from manylora.server.engine.grammar.schema import check_size
from manylora.server.engine.grammar.tables import Tables, TokenSet

__all__ = [
    "CompiledGrammar",
    "Grammar",
    "GrammarFault",
    "GrammarKind",
    "GrammarRefused",
    "Grammars",
    "Masks",
    "Matcher",
    "Standing",
    "Tables",
    "TokenSet",
    "Words",
    "check_size",
]
