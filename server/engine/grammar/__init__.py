"""Grammars that answers are held to: what one is, how it is compiled, and which tokens it lets follow.

The one room that knows llguidance.
"""

from manylora.server.engine.grammar.grammar import Grammar, GrammarKind

__all__ = ["Grammar", "GrammarKind"]
