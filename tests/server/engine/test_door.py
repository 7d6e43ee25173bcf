"""What no step could compute is refused at the door, with numbers; what fits says how many tokens it may have."""

from dataclasses import replace
from typing import Any

import pytest

from manylora.server.engine.adapter_cache import AdapterCache, HeldAdapter
from manylora.server.engine.door import LARGEST_WEIGHT, check_request, context_exceeded, fitted
from manylora.server.engine.request import UNBOUNDED, GenerationRequest, Pooling, SamplingParams
from manylora.server.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound
from tests.server.engine.fakes import ask, weights

VOCAB = 64


def asking(prompt: int, most: int) -> GenerationRequest:
    return ask("r", [1] * prompt, sampling=SamplingParams(max_tokens=most))


@pytest.mark.parametrize(
    ("prompt", "most", "may"), [(10, 6, 6), (10, 1, 1), (10, UNBOUNDED, 6), (15, UNBOUNDED, 1), (15, 1, 1)]
)
def test_what_fits_says_how_many_tokens_it_may_have(prompt: int, most: int, may: int) -> None:
    assert fitted(asking(prompt, most), 16).sampling.max_tokens == may


def test_what_is_pooled_makes_no_tokens_and_may_fill_the_context() -> None:
    request = replace(asking(16, 1), pooling=Pooling.LAST)
    assert fitted(request, 16) is request
    with pytest.raises(ContextLengthExceeded, match=r"16 tokens, and it has 17$"):
        fitted(replace(asking(17, 1), pooling=Pooling.LAST), 16)


@pytest.mark.parametrize(
    ("prompt", "most", "says", "param"),
    [
        (10, 7, "16 tokens, but it has 10 and max_tokens is 7; reduce", "max_tokens"),
        (16, 1, "16 tokens, but it has 16 and max_tokens is 1; reduce", "max_tokens"),
        (16, UNBOUNDED, "16 tokens, but it has 16 and max_tokens is at least 1; reduce", None),
    ],
)
def test_what_does_not_fit_says_by_how_much(prompt: int, most: int, says: str, param: str | None) -> None:
    with pytest.raises(ContextLengthExceeded, match=says) as refused:
        fitted(asking(prompt, most), 16)
    overrun = refused.value.overrun
    assert overrun is not None
    asked = None if most == UNBOUNDED else most
    assert (overrun.prompt, overrun.asked, overrun.context) == (prompt, asked, 16)
    assert refused.value.param == param


def test_a_text_that_was_not_read_to_its_end_has_at_least_so_many() -> None:
    assert "it has at least 99 and" in context_exceeded(99, 1, 16, at_least=True).message
    assert "it has at least 99" in context_exceeded(99, 0, 16, at_least=True).message


def known(adapter_id: int, rank: int = 4) -> HeldAdapter:
    made = weights(adapter_id, rank)
    return HeldAdapter(adapter_id, made.rank_by_module(), lambda: made, False, made)


def cache() -> AdapterCache:
    made = AdapterCache({"q_proj": 8, "v_proj": 8}, 1 << 20, {"q_proj": 8, "v_proj": 8})
    for adapter_id in (1, 2, 3):
        made.add(known(adapter_id))
    made[3].retired = True
    return made


GREEDY = SamplingParams()
GOOD = ask("r", [0, VOCAB - 1], adapters=((1, 1.0), (2, -LARGEST_WEIGHT)))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"adapters": ()},
        {"adapters": ((1, 1.0),), "vocab_size": VOCAB + 2, "prompt_token_ids": (VOCAB + 1,)},
        {"pooling": Pooling.MEAN, "pooled_from": 1},
        {"sampling": replace(GREEDY, logit_bias={VOCAB - 1: 1.0}, stop_token_ids=(0,))},
    ],
)
def test_what_can_be_computed_comes_in(changes: dict[str, Any]) -> None:
    check_request(replace(GOOD, **changes), VOCAB, cache())


@pytest.mark.parametrize(
    ("changes", "kind", "says"),
    [
        ({"prompt_token_ids": ()}, InvalidRequest, "at least one token"),
        ({"prompt_token_ids": (1, VOCAB)}, InvalidRequest, "prompt has the token id 64, .* ids 0 to 63"),
        ({"prompt_token_ids": (1, -1)}, InvalidRequest, "token id -1"),
        ({"sampling": replace(GREEDY, logit_bias={VOCAB: 1.0})}, InvalidRequest, "logit_bias has .* id 64"),
        ({"sampling": replace(GREEDY, stop_token_ids=(-2,))}, InvalidRequest, "stop_token_ids has .* id -2"),
        ({"adapters": ((1, 1.0),), "vocab_size": 9, "prompt_token_ids": (9,)}, InvalidRequest, "ids 0 to 8"),
        ({"vocab_size": VOCAB}, InvalidRequest, "not mixed"),
        ({"adapters": ((1, 0.5),), "vocab_size": VOCAB}, InvalidRequest, "not mixed"),
        ({"n": 0}, InvalidRequest, "at least 1"),
        ({"sampling": replace(GREEDY, max_tokens=0)}, InvalidRequest, "at least 1"),
        ({"pooling": Pooling.LAST, "n": 2}, InvalidRequest, "n is 1"),
        ({"pooled_from": 2}, InvalidRequest, "from one of the prompt's tokens"),
        ({"pooled_from": -1}, InvalidRequest, "from one of the prompt's tokens"),
        ({"adapters": ((1, float("nan")),)}, InvalidRequest, "not nan"),
        ({"adapters": ((1, 2 * LARGEST_WEIGHT),)}, InvalidRequest, "finite number of 32 bits"),
        ({"adapters": ((1, 1.0), (9, 1.0))}, ModelNotFound, "no model 'label-r' any more"),
        ({"adapters": ((3, 1.0),)}, ModelNotFound, "any more"),
    ],
)
def test_what_can_not_be_computed_is_refused(
    changes: dict[str, Any], kind: type[Exception], says: str
) -> None:
    with pytest.raises(kind, match=says):
        check_request(replace(GOOD, **changes), VOCAB, cache())


def test_adapters_that_never_fit_together_are_refused_with_the_numbers() -> None:
    held = cache()
    held.add(known(4, rank=5))
    check_request(replace(GOOD, adapters=((4, 1.0),)), VOCAB, held)
    with pytest.raises(InvalidRequest, match=r"the 2 adapters .* 9 rank rows of q_proj, the arena has 8"):
        check_request(replace(GOOD, adapters=((1, 1.0), (4, 1.0))), VOCAB, held)
