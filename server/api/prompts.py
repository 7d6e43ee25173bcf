"""Prompts to token ids, off the event loop. What can't fit the context is refused, by its length if that says so."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from manylora.server.api.dependencies import ApiDependencies
from manylora.server.api.schemas import ChatRequest, CompletionRequest, Message
from manylora.server.api.tokenising import Lane, check_length, most_characters
from manylora.server.catalog import ResolvedModel
from manylora.server.chat.templates import TemplateFailed
from manylora.server.errors import ContextLengthExceeded, InvalidRequest, QueueFull
from manylora.server.tokenizer import ModelText, TooManyTokens
from manylora.server.workers.pool import WorkersBusy


async def chat_prompt(
    deps: ApiDependencies, body: ChatRequest, model: ResolvedModel, text: ModelText
) -> list[int]:
    """Return the chat's token ids, by the adapter's template or else the base's.

    Raises ContextLengthExceeded, InvalidRequest for messages that the template refuses, and QueueFull.
    """
    with _told_in_full(body.asked_tokens, deps.settings.context_length):
        return await chat_tokens(
            deps,
            model,
            text,
            for_template(body.messages),
            body.template_variables,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            at_most=deps.settings.context_length,
        )


async def chat_tokens(
    deps: ApiDependencies,
    model: ResolvedModel,
    text: ModelText,
    messages: Sequence[Mapping[str, object]],
    variables: Mapping[str, object] | None = None,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    at_most: int,
    lane: Lane | None = None,
    most: int | None = None,
) -> list[int]:
    """Render messages by the model's template and tokenise them; ``variables`` are for the template.

    ``lane`` None is that of prompts; ``most`` are the characters that may be tokenised, None: as ``at_most`` has it.
    The template writes bos itself, so no tokens are added. Control tokens are parsed wherever they stand, in a user's
    text too: that is what vLLM and others do; a front end that must prevent it has to filter what users send.
    Raises TooManyTokens over ``at_most``, InvalidRequest for what the template refuses, and QueueFull.
    """
    lane = lane or deps.tokenising.prompts
    how = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
    seen = {**text.special_tokens, **(variables or {})}
    if model.chat_template is None:
        written = sum(len(str(message.get("content"))) for message in messages)
        rendered = await lane.run(lambda: deps.tokenizer.render(messages, seen, **how), written)
    else:
        rendered = await _by_adapter(deps, model.chat_template, messages, seen, how)
    _check_characters(deps, rendered, at_most, most or most_characters(at_most), "messages")
    [ids] = await text.codec.encode(lane, [rendered], add_special_tokens=False, at_most=at_most)
    return ids


async def _by_adapter(
    deps: ApiDependencies,
    template: str,
    messages: Sequence[Mapping[str, object]],
    seen: Mapping[str, object],
    how: Mapping[str, bool],
) -> str:
    """Render by a template from outside, in a process of its own."""
    try:
        return await deps.texts.templates.render(template, messages, seen, **how)
    except TemplateFailed as error:
        raise InvalidRequest(
            f"the chat template refuses these messages: {error}", param="messages"
        ) from error
    except WorkersBusy as error:
        raise QueueFull(
            f"the adapter's chat template is busy: {error}; try again later", retry_after=1
        ) from error


async def completion_prompts(
    deps: ApiDependencies, body: CompletionRequest, text: ModelText
) -> list[Sequence[int]]:
    """Return each prompt's token ids. Raises ContextLengthExceeded, InvalidRequest and QueueFull."""
    settings, prompts = deps.settings, body.prompts()
    with _told_in_full(body.asked_tokens, settings.context_length):
        for prompt in prompts:
            if isinstance(prompt, str):
                continue
            if len(prompt) > settings.context_length:
                raise TooManyTokens(len(prompt), at_least=False)
            check_token_ids(prompt, settings.vocab_size, "prompt")
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        for prompt in texts:
            most = most_characters(settings.context_length)
            _check_characters(deps, prompt, settings.context_length, most, "prompt")
        special = body.add_special_tokens
        encoded = iter(
            await text.codec.encode(
                deps.tokenising.prompts, texts, add_special_tokens=special, at_most=settings.context_length
            )
        )
    return [next(encoded) if isinstance(prompt, str) else prompt for prompt in prompts]


async def echoed_texts(deps: ApiDependencies, body: CompletionRequest, text: ModelText) -> list[str]:
    """Return each prompt as it was sent; token ids with control tokens spelled out."""
    return [
        prompt if isinstance(prompt, str) else await text.codec.spell(deps.tokenising.prompts, prompt)
        for prompt in body.prompts()
    ]


def _check_characters(deps: ApiDependencies, text: str, at_most: int, most: int, param: str) -> None:
    """Refuse a text that would take a tokenizer too much; one of too many tokens by its length is ``encode``'s."""
    if deps.tokenizer.least_tokens(text) <= at_most:
        check_length(len(text), most, param)


def for_template(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Return messages as chat templates take them."""
    return [message.for_template() for message in messages]


def check_token_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    """Raise InvalidRequest for the first id that the vocabulary doesn't have."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
        raise InvalidRequest(f"{param}: token id {wrong} is not in 0 to {vocab_size - 1}", param=param)


def context_exceeded(prompt: int | str, asked: int | None, context: int) -> ContextLengthExceeded:
    """Return the error with its three numbers."""
    wanted = "max_tokens is at least 1" if asked is None else f"max_tokens is {asked}"
    return ContextLengthExceeded(
        f"the prompt has {prompt} tokens and {wanted}, together more than the context of {context} tokens",
        param="max_tokens" if asked is not None else None,
    )


@contextmanager
def _told_in_full(asked: int | None, context: int) -> Iterator[None]:
    try:
        yield
    except TooManyTokens as error:
        count = f"at least {error.count}" if error.at_least else error.count
        raise context_exceeded(count, asked, context) from None
