"""Grammars made ready for a model's tokens, before its prompts are queued."""

from functools import partial

from manylora.server.api.dependencies import ApiDependencies
from manylora.server.engine.grammar import CompiledGrammar, Grammar, GrammarRefused, TokenSet
from manylora.server.errors import InvalidRequest
from manylora.server.tokenizer import ModelText


async def compiled(deps: ApiDependencies, grammar: Grammar, text: ModelText) -> CompiledGrammar:
    """Return the grammar over a model's tokens. Raises InvalidRequest naming the field, and QueueFull."""
    if deps.grammars is None:
        raise InvalidRequest("answers can't be held to a grammar here", param=grammar.param)
    try:
        return await deps.grammars.compile(grammar, tokens_of(deps, text))
    except GrammarRefused as error:
        raise InvalidRequest(str(error), param=grammar.param) from error


def tokens_of(deps: ApiDependencies, text: ModelText) -> TokenSet:
    """Return what grammars need to know of a model's tokens.

    How the base's tokenizer cuts a text is known too: the one that an adapter brings is never run in this process.
    """
    # A tokenizer that puts a space before a text cuts none as it stands.
    known = text.fingerprint == deps.texts.base.fingerprint and not text.vocabulary.strips_first_space
    return TokenSet(
        text.fingerprint,
        text.vocabulary.pieces,
        text.vocabulary.control_tokens,
        text.eos_ids,
        partial(deps.tokenizer.encode, add_special_tokens=False) if known else None,
    )
