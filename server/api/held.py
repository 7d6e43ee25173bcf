"""Grammars made ready for a model's tokens, before its prompts are queued."""

import json
from functools import partial

from manylora.server.api.asks import Ask
from manylora.server.api.calling import current_caller
from manylora.server.api.dependencies import ApiDependencies
from manylora.server.api.prompts import Tokenised
from manylora.server.api.talk import held
from manylora.server.chat.tools import ToolUse
from manylora.server.engine.grammar import CompiledGrammar, Grammar, GrammarKind, GrammarRefused, TokenSet
from manylora.server.errors import InvalidRequest
from manylora.server.tokenizer import ModelText


async def grammar_of(
    deps: ApiDependencies, ask: Ask, prompts: Tokenised, text: ModelText
) -> CompiledGrammar | None:
    """Return what the answers are held to, ready to be followed; None: nothing.

    Where a tool's schema can't be held, and the request doesn't say that it must be, its arguments are any object.
    Raises InvalidRequest naming the field, and QueueFull.
    """
    controls = text.vocabulary.control_tokens
    strict: Grammar | None = None
    try:
        strict = held(ask, prompts.reading, prompts.thought, controls, loose=False)
        return None if strict is None else await compiled(deps, strict, text)
    except InvalidRequest:
        if prompts.reading.format is None or not prompts.reading.use.callable:
            raise
    loose = held(ask, prompts.reading, prompts.thought, controls, loose=True)
    assert loose is not None
    try:
        return await compiled(deps, loose, text)
    except InvalidRequest:
        await _name_the_tool(deps, prompts.reading.use, text)
        raise


async def _name_the_tool(deps: ApiDependencies, use: ToolUse, text: ModelText) -> None:
    """Raise InvalidRequest for the first tool that alone can't be held."""
    for tool in use.tools:
        if tool.held and not tool.raw:
            schema = json.dumps(tool.schema, ensure_ascii=False)
            await compiled(deps, Grammar(GrammarKind.JSON_SCHEMA, schema, param=tool.param), text)


async def compiled(deps: ApiDependencies, grammar: Grammar, text: ModelText) -> CompiledGrammar:
    """Return the grammar over a model's tokens. Raises InvalidRequest naming the field, and QueueFull."""
    if deps.grammars is None:
        raise InvalidRequest("answers can't be held to a grammar here", param=grammar.param)
    try:
        return await deps.grammars.compile(grammar, tokens_of(deps, text), current_caller().tenant)
    except GrammarRefused as error:
        raise InvalidRequest(str(error), param=grammar.param) from error


def tokens_of(deps: ApiDependencies, text: ModelText) -> TokenSet:
    """Return what grammars need to know of a model's tokens.

    How the base's tokenizer cuts a text is known too: the one that an adapter brings is never run in this process.
    """
    # A tokenizer that puts a space before a text cuts none as it stands.
    known = text.fingerprint == deps.texts.base.fingerprint and not text.vocabulary.strips_first_space
    return TokenSet(
        text.fingerprint if text.own_size is None else f"{text.fingerprint} of {text.own_size}",
        text.vocabulary.pieces,
        text.vocabulary.control_tokens,
        text.eos_ids,
        partial(deps.tokenizer.encode, add_special_tokens=False) if known else None,
        text.own_size,
    )
