"""Prompts to token ids, off the event loop. What can't fit the context is refused, by its length if that says so."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from manylora.server.api.asks import Ask, ChatPrompt, PlainPrompts
from manylora.server.api.dependencies import ApiDependencies
from manylora.server.api.middle import with_suffix
from manylora.server.api.talk import Talk
from manylora.server.api.token_ids import check_token_ids
from manylora.server.api.tokenising import Lane, check_length, most_characters
from manylora.server.catalog import ResolvedModel
from manylora.server.chat.reading import Reading
from manylora.server.chat.templates import TemplateFailed
from manylora.server.engine.door import context_exceeded
from manylora.server.engine.request import UNBOUNDED
from manylora.server.errors import InvalidRequest, QueueFull
from manylora.server.tokenizer import ModelText, TooManyTokens
from manylora.server.workers.pool import WorkersBusy

MOST_POOLED = 300_000
"""Tokens of all inputs of a request together that are pooled, as OpenAI has it."""


@dataclass(frozen=True, slots=True)
class Tokenised:
    """A request's prompts as the model reads them."""

    ids: list[Sequence[int]]
    echoed: tuple[str, ...] = ()
    """As they were sent, if they are to be echoed; token ids with control tokens spelled out."""
    ends: frozenset[int] = frozenset()
    """Ids that end the answers besides the model's own."""
    reading: Reading = field(default_factory=Reading)
    """How answers are read."""
    thought: str | None = None
    """What ends the thoughts that are to come before an answer; None: none are."""


async def tokenise(deps: ApiDependencies, ask: Ask, model: ResolvedModel, text: ModelText) -> Tokenised:
    """Return the prompts' token ids; a chat's by the adapter's template or else the base's.

    Raises ContextLengthExceeded, InvalidRequest for messages that the template refuses, and QueueFull.
    """
    prompt, context = ask.prompt, deps.settings.context_length
    ends: frozenset[int] = frozenset()
    with _told_in_full(0 if ask.pooling is not None else ask.sampling.max_tokens, context):
        if isinstance(prompt, PlainPrompts):
            ids = await _plain(deps, prompt, text)
            if prompt.suffix:
                ids, ends = await with_suffix(deps, prompt, ids, text)
            if ask.pooling is not None:
                _check_pooled(ids, prompt.param)
        else:
            talk = talk_of(deps, model, text, prompt)
            rendered = await _rendered(deps, model, text, talk, deps.tokenising.prompts)
            lane, most = deps.tokenising.prompts, most_characters(context)
            ids = [await _encoded(deps, text, rendered, context, lane, most, prompt.param)]
            return Tokenised(ids, reading=talk.reading(rendered), thought=talk.thought_ends_with(rendered))
    # After the check of the ids: those that no vocabulary has can't be spelled.
    if isinstance(prompt, PlainPrompts) and prompt.echo:
        return Tokenised(ids, await _echoed(deps, prompt, text))
    return Tokenised(ids, ends=ends)


async def chat_tokens(
    deps: ApiDependencies,
    model: ResolvedModel,
    text: ModelText,
    prompt: ChatPrompt,
    *,
    at_most: int,
    lane: Lane | None = None,
    most: int | None = None,
) -> list[int]:
    """Render messages by the model's template and tokenise them.

    ``lane`` None is that of prompts; ``most`` are the characters that may be tokenised, None: as ``at_most`` has it.
    The template writes bos itself, so no tokens are added. Control tokens are parsed wherever they stand, in a user's
    text too: that is what vLLM and others do; a front end that must prevent it has to filter what users send.
    Raises TooManyTokens over ``at_most``, InvalidRequest for what the template refuses, and QueueFull.
    """
    lane = lane or deps.tokenising.prompts
    rendered = await _rendered(deps, model, text, talk_of(deps, model, text, prompt), lane)
    return await _encoded(deps, text, rendered, at_most, lane, most or most_characters(at_most), prompt.param)


def talk_of(deps: ApiDependencies, model: ResolvedModel, text: ModelText, prompt: ChatPrompt) -> Talk:
    """Return a chat as the model's template takes it. Raises InvalidRequest for what the template doesn't know."""
    template = model.chat_template or deps.tokenizer.template(tools=bool(prompt.tools.tools))
    return Talk.of(prompt, template, text.vocabulary, deps.settings.tool_parser)


async def _rendered(
    deps: ApiDependencies, model: ResolvedModel, text: ModelText, talk: Talk, lane: Lane
) -> str:
    prompt = talk.prompt
    how = {
        "add_generation_prompt": prompt.add_generation_prompt,
        "continue_final_message": prompt.continue_final_message,
    }
    seen = {**text.special_tokens, **prompt.variables}
    if model.chat_template is not None:
        return await _by_adapter(deps, model.chat_template, prompt, seen, how)
    written = sum(len(str(message.get("content"))) for message in prompt.messages)
    return await lane.run(lambda: deps.tokenizer.render(prompt.messages, seen, **how), written)


async def _encoded(
    deps: ApiDependencies, text: ModelText, rendered: str, at_most: int, lane: Lane, most: int, param: str
) -> list[int]:
    _check_characters(deps, rendered, at_most, most, param)
    [ids] = await text.codec.encode(lane, [rendered], add_special_tokens=False, at_most=at_most)
    return ids


async def _by_adapter(
    deps: ApiDependencies,
    template: str,
    prompt: ChatPrompt,
    seen: Mapping[str, object],
    how: Mapping[str, bool],
) -> str:
    """Render by a template from outside, in a process of its own."""
    try:
        return await deps.texts.templates.render(template, prompt.messages, seen, **how)
    except TemplateFailed as error:
        raise InvalidRequest(
            f"the chat template refuses these messages: {error}", param=prompt.param
        ) from error
    except WorkersBusy as error:
        raise QueueFull(
            f"the adapter's chat template is busy: {error}; try again later", retry_after=1
        ) from error


async def _plain(deps: ApiDependencies, asked: PlainPrompts, text: ModelText) -> list[Sequence[int]]:
    settings, prompts = deps.settings, asked.prompts
    for prompt in prompts:
        if isinstance(prompt, str):
            continue
        if len(prompt) > settings.context_length:
            raise TooManyTokens(len(prompt), at_least=False)
        check_token_ids(prompt, text.own_size or settings.vocab_size, asked.param)
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    for prompt in texts:
        most = most_characters(settings.context_length)
        _check_characters(deps, prompt, settings.context_length, most, asked.param)
    encoded = iter(
        await text.codec.encode(
            deps.tokenising.prompts,
            texts,
            add_special_tokens=asked.add_special_tokens and not asked.suffix,
            at_most=settings.context_length,
        )
    )
    return [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]


def _check_pooled(inputs: Sequence[Sequence[int]], param: str) -> None:
    """Refuse an input that has no state, and more of them than one request may bring. Raises InvalidRequest."""
    empty = next((index for index, each in enumerate(inputs) if not each), None)
    if empty is not None:
        raise InvalidRequest(f"{param}: input {empty} is empty, give at least one token", param=param)
    total = sum(map(len, inputs))
    if total > MOST_POOLED:
        raise InvalidRequest(
            f"{param}: the inputs have {total} tokens together, at most {MOST_POOLED} are taken in one request: "
            "send several",
            param=param,
        )


async def _echoed(deps: ApiDependencies, asked: PlainPrompts, text: ModelText) -> tuple[str, ...]:
    lane = deps.tokenising.prompts
    return tuple(
        [
            prompt if isinstance(prompt, str) else await text.codec.spell(lane, prompt)
            for prompt in asked.prompts
        ]
    )


def _check_characters(deps: ApiDependencies, text: str, at_most: int, most: int, param: str) -> None:
    """Refuse a text that would take a tokenizer too much; one of too many tokens by its length is ``encode``'s."""
    if deps.tokenizer.least_tokens(text) <= at_most:
        check_length(len(text), most, param)


@contextmanager
def _told_in_full(max_tokens: int, context: int) -> Iterator[None]:
    try:
        yield
    except TooManyTokens as error:
        asked = None if max_tokens == UNBOUNDED else max_tokens
        raise context_exceeded(error.count, asked, context, at_least=error.at_least) from None
