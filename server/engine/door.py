"""What the engine refuses at its door: requests that no step could compute, whoever made them. Changes nothing."""

from dataclasses import replace

import numpy as np

from manylora.server.engine.adapter_cache import AdapterCache
from manylora.server.engine.request import UNBOUNDED, GenerationRequest
from manylora.server.engine.room import lack
from manylora.server.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound, Overrun

LARGEST_WEIGHT = float(np.finfo(np.float32).max)
"""Of float32, in which weights are computed."""


def fitted(request: GenerationRequest, limit: int) -> GenerationRequest:
    """Return the request with a max_tokens that says how many, if prompt and answer fit ``limit`` tokens together.

    The one place where a prompt's length is held against the context. Raises ContextLengthExceeded.
    """
    prompt, asked = len(request.prompt_token_ids), request.asked_tokens
    wanted = max(1, limit - prompt) if asked == UNBOUNDED else asked
    if prompt + wanted > limit:
        raise context_exceeded(prompt, None if asked == UNBOUNDED else asked, limit)
    if wanted == asked or request.pooling is not None:
        return request
    return replace(request, sampling=replace(request.sampling, max_tokens=wanted))


def context_exceeded(
    prompt: int, asked: int | None, context: int, *, at_least: bool = False
) -> ContextLengthExceeded:
    """Return the error with its numbers; ``asked`` None: as many as fit, 0: the prompt alone must.

    ``at_least``: no more is known of a prompt than that it has ``prompt`` tokens or more.
    """
    overrun = Overrun(prompt, asked, context)
    count = f"at least {prompt}" if at_least else f"{prompt}"
    # The words of vLLM and Anthropic, by which LiteLLM and LangChain know that a conversation must be shortened.
    longest = f"this model's maximum context length is {context} tokens"
    if asked == 0:
        return ContextLengthExceeded(f"{longest}, and it has {count}", overrun)
    wanted = "max_tokens is at least 1" if asked is None else f"max_tokens is {asked}"
    return ContextLengthExceeded(
        f"the prompt is too long: {longest}, but it has {count} and {wanted}; reduce its length or max_tokens",
        overrun,
        param="max_tokens" if asked is not None else None,
    )


def check_request(request: GenerationRequest, vocab_size: int, cache: AdapterCache) -> None:
    """Raise ModelNotFound for an adapter that is unknown or leaving, InvalidRequest for what can't be run.

    Callable from any thread.
    """
    _check_ids(request, request.vocab_size or vocab_size)
    if request.vocab_size is not None and [weight for _, weight in request.adapters] != [1.0]:
        raise InvalidRequest("an adapter that brings tokens is used as it is, not mixed", param="model")
    if not request.prompt_token_ids:
        raise InvalidRequest("the prompt is empty: give at least one token", param="prompt")
    if request.n < 1 or request.sampling.max_tokens < 1:
        raise InvalidRequest("a request needs n and max_tokens of at least 1")
    if request.pooling is not None and request.n != 1:
        raise InvalidRequest("a prompt is pooled once: n is 1")
    if not 0 <= request.pooled_from < len(request.prompt_token_ids):
        raise InvalidRequest("states are pooled from one of the prompt's tokens on")
    _check_adapters(request, cache)


def _check_ids(request: GenerationRequest, size: int) -> None:
    """Refuse token ids that the model has no row for, whatever they come from: ids, a text or a template."""
    sampling = request.sampling
    named = {
        "the prompt": request.prompt_token_ids,
        "logit_bias": sampling.logit_bias,
        "stop_token_ids": sampling.stop_token_ids,
    }
    for what, ids in named.items():
        if ids and not (min(ids) >= 0 and max(ids) < size):
            wrong = next(token_id for token_id in ids if not 0 <= token_id < size)
            raise InvalidRequest(
                f"{what} has the token id {wrong}, but the model's vocabulary has {size} tokens, ids 0 to "
                f"{size - 1}; a tokenizer may know tokens that the model was never given: leave out what spells one"
            )


def _check_adapters(request: GenerationRequest, cache: AdapterCache) -> None:
    for _, weight in request.adapters:
        # NaN would be no key of a cache, and infinity no answer.
        if not abs(weight) <= LARGEST_WEIGHT:
            raise InvalidRequest(f"a weight is a finite number of 32 bits, not {weight}", param="model")
    adapters = {adapter_id: cache.get(adapter_id) for adapter_id, _ in request.adapters}
    held = [each for each in adapters.values() if each is not None and not each.retired]
    if len(held) < len(adapters):
        raise ModelNotFound(f"there is no model {request.adapter_label!r} any more", param="model")
    if not cache.fits(held):
        # It would wait for ever: all are on the device at once, or the request doesn't begin.
        what, flag = lack(cache.needs(held), cache.allocator.rows)
        raise InvalidRequest(
            f"the {len(held)} adapters of this request together need {what}: use fewer of them, or start with a larger "
            f"{flag}",
            param="model",
        )
