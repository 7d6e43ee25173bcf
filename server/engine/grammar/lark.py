"""A grammar as the library takes it: everything becomes Lark, so that there is one way in."""

import copy
import json
import re
from collections.abc import Mapping
from typing import Any

from manylora.server.engine.grammar.bounds import fractions_of, move_in
from manylora.server.engine.grammar.formats import say_exactly
from manylora.server.engine.grammar.grammar import Grammar, GrammarKind, GrammarRefused
from manylora.server.engine.grammar.meeting import groups
from manylora.server.engine.grammar.places import places_in
from manylora.server.engine.grammar.refusals import told
from manylora.server.engine.grammar.schema import check_schema

WHITESPACE = r" ?|\n {0,32}|\n\t{0,8}"
"""Between two parts of JSON: nothing, a space, or a new line with its indent. Models that may go on with white space
for ever do (vLLM's issues 38696 and 21026); those that may have none write worse."""
OPTIONS: Mapping[str, object] = {
    "lenient": False,
    "coerce_one_of": False,
    "whitespace_flexible": True,
    "whitespace_pattern": WHITESPACE,
    "item_separator": ",",
    "key_separator": ":",
}
"""Of each schema: all there are, so that none is left to whoever asks."""
MAX_TEXT = 64 << 10
"""Characters of a regular expression or of a grammar."""
_SCHEMA = re.compile(r"%json\s*(?=[{\[])")
_NO_FORCING = '%llguidance {"no_forcing": true}\n'


def lark_of(grammar: Grammar, controls: Mapping[str, int], *, forces: bool) -> str:
    """Return a grammar in the library's own form. Raises GrammarRefused.

    ``controls`` are the tokenizer's control tokens. Without ``forces`` tokens are never taken for certain because only
    one way to spell them is usual.
    """
    body = _body(grammar)
    head = "" if forces else _NO_FORCING
    if grammar.after is None:
        return head + body
    token = controls.get(grammar.after)
    if token is not None:
        before = f"start: free <[{token}]> space @held\nfree: /(?s:.*)/\nspace: /\\n{{0,2}}/\n"
    else:
        before = (
            f"start: free space @held\nfree[lazy]: /(?s:.*){_quoted(grammar.after)}/\nspace: /\\n{{0,2}}/\n"
        )
    parts = [{"lark_grammar": head + before}, {"name": "held", "lark_grammar": head + body}]
    return json.dumps({"grammars": parts})


def _body(grammar: Grammar) -> str:
    if grammar.kind is GrammarKind.JSON_SCHEMA:
        return f"start: %json {_schema(json.loads(grammar.text))}\n"
    if len(grammar.text) > MAX_TEXT:
        raise GrammarRefused(f"it has {len(grammar.text):,} characters, at most {MAX_TEXT:,} are compiled")
    if grammar.kind is GrammarKind.REGEX:
        from llguidance import regex_to_lark

        return f"start: /{regex_to_lark(grammar.text)}/\n"
    text = grammar.text
    if grammar.kind is GrammarKind.EBNF:
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            text = any_to_lark(text)
        except Exception as error:
            raise GrammarRefused(f"it is neither Lark nor GBNF: {error}") from error
    return _with_options(text)


def _schema(schema: Any) -> str:
    check_schema(schema, _unsatisfiable)
    if schema is False:
        raise GrammarRefused("nothing satisfies the schema false")
    return _said({} if schema is True else schema)


def _said(schema: dict[str, Any]) -> str:
    """Return a schema as the library is to take it; it is changed."""
    places = list(places_in(schema))
    meeting = groups(schema, places)
    for place in places:
        say_exactly(place.schema)
    for group in meeting:
        fractions = fractions_of(group)
        for each in group:
            move_in(each, fractions)
    return json.dumps({**schema, "x-guidance": OPTIONS}, ensure_ascii=False)


def _unsatisfiable(schema: Mapping[str, Any]) -> str | None:
    """See ends.Unsatisfiable."""
    from llguidance import LLMatcher

    text = f"start: %json {_said(copy.deepcopy(dict(schema)))}\n"
    wrong, reasons = LLMatcher.validate_grammar_with_warnings(text)
    if not wrong:
        return None
    return next((told(each) for each in reasons if "Unsatisfiable" in each), "")


def _with_options(text: str) -> str:
    """Return Lark with our options in each schema inside it, checked as if it stood alone."""
    parts: list[str] = []
    end = 0
    for found in _SCHEMA.finditer(text):
        if found.start() < end:
            continue  # inside the schema before
        try:
            schema, stop = json.JSONDecoder().raw_decode(text, found.end())
        except ValueError as error:
            raise GrammarRefused(f"what follows %json is not JSON: {error}") from None
        parts += (text[end : found.end()], _schema(schema))
        end = stop
    return "".join((*parts, text[end:]))


def _quoted(text: str) -> str:
    """Return a text as a regular expression between slashes."""
    return "".join(c if c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)
