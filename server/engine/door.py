"""What the engine refuses at its door: requests that no step could compute, whoever made them. Changes nothing."""

import numpy as np

from manylora.server.engine.adapter_cache import AdapterCache
from manylora.server.engine.request import GenerationRequest
from manylora.server.errors import InvalidRequest, ModelNotFound

LARGEST_WEIGHT = float(np.finfo(np.float32).max)
"""Of float32, in which weights are computed."""


def check_request(request: GenerationRequest, vocab_size: int, cache: AdapterCache) -> None:
    """Raise ModelNotFound for an adapter that is unknown or leaving, InvalidRequest for what can't be run.

    Callable from any thread.
    """
    _check_ids(request, vocab_size)
    if not request.prompt_token_ids or request.n < 1 or request.sampling.max_tokens < 1:
        raise InvalidRequest("a request needs a prompt of at least one token, n and max_tokens of at least 1")
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
        needs = cache.needs(held)
        module, rows = max(needs.items(), key=lambda item: item[1] - cache.allocator.rows.get(item[0], 0))
        raise InvalidRequest(
            f"the {len(held)} adapters of this request together need {rows} rank rows of {module}, the arena has "
            f"{cache.allocator.rows.get(module, 0)}: use fewer of them, or start with a larger --arena-rows",
            param="model",
        )
