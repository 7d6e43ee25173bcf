"""A grammar for one tokenizer, ready to be followed."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from manylora.server.engine.grammar.grammar import Grammar, GrammarRefused
from manylora.server.engine.grammar.lark import lark_of
from manylora.server.engine.grammar.matcher import Matcher
from manylora.server.engine.grammar.refusals import told
from manylora.server.engine.grammar.tables import Tables

if TYPE_CHECKING:
    from llguidance import LLParserLimits


class CompiledGrammar:
    """Answers are held to it by a matcher each; they share what the library learns of it, and its limit's room."""

    def __init__(self, grammar: Grammar, tables: Tables) -> None:
        """Compile (milliseconds as a rule, without the interpreter's lock). Raises GrammarRefused."""
        # With the first grammar: an engine without any does without the library.
        from llguidance import LLMatcher

        self.grammar = grammar
        self._tables = tables
        try:
            grammar.text.encode()
            text = lark_of(grammar, tables.controls, forces=tables.forces)
            text.encode()  # a schema's escapes are characters by now
        except UnicodeEncodeError:
            raise GrammarRefused("it holds half a character (a lone surrogate)") from None
        self._native = LLMatcher(tables.native, text, log_level=0, limits=limits())
        if self._native.is_error():
            raise GrammarRefused(told(self._native.get_error()))
        self.broken = False
        """Whether one that follows it met a limit: the next request has it compiled anew."""

    def matcher(self, ends: Iterable[int], min_tokens: int) -> Matcher:
        """Return an answer's place in it, at the beginning. One thread at a time."""
        return Matcher(self._native.deep_copy(), self._tables, ends, min_tokens)


def limits() -> "LLParserLimits":
    """Return the library's own: some 20 ms of building, and of a mask; what it says doesn't repeat the grammar."""
    from llguidance import LLParserLimits

    return LLParserLimits(verbose_errors=False)
