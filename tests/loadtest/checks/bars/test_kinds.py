"""How the bar of kinds knows that all were in one batch, and what it asks."""

from pathlib import Path

from manylora.loadtest.checks.bars.kinds import together
from manylora.loadtest.checks.bars.kinds_material import INVOCATIONS, LONGEST_PROMPT, Served, make_asks
from manylora.loadtest.checks.bars.material import Material
from manylora.loadtest.material.answer import Answer
from manylora.loadtest.material.peft_adapters import activated_kinds, token_kinds
from manylora.server.kernels.choose import PLAIN


def test_answers_are_together_that_were_under_way_at_one_moment() -> None:
    def answered(*times: float) -> Answer:
        return Answer(times=list(times))

    assert together([answered(1, 2, 5), answered(4, 6), answered(3, 4.5), answered(9)]) == 3
    assert together([answered(1, 2), answered(3, 4), Answer()]) == 1
    assert together([]) == 0


def test_each_model_is_asked_with_its_own_ids_and_no_other_kind_with_new_ones() -> None:
    kinds = {kind.name: kind for kind in [*activated_kinds(INVOCATIONS), *token_kinds(320)]}
    mixture = [("trained tokens", 0.5), ("whole head", 2.0)]
    served = Served(Material(Path("base"), Path("adapters"), PLAIN), kinds, {"mixed": mixture})
    asks = make_asks(served, 2 * len(served.models), 80, 4)
    assert [ask.model for ask in asks] == served.models * 3
    for ask in asks[: len(served.models)]:
        own = served.own_ids(ask.model)
        places = range(len(ask.prompt) - len(own) + 1)
        assert any(ask.prompt[place : place + len(own)] == own for place in places), ask
    assert served.own_ids("mixed") == (3, 7, 70, 200)
    for ask in asks:
        kind = kinds.get(ask.model)
        assert max(ask.prompt) < ((kind and kind.size) or 320), ask
    assert {1, LONGEST_PROMPT} <= {len(ask.prompt) for ask in asks}
    judge = asks[len(served.models) :][1]
    assert kinds[judge.model].invocation
    assert not set(INVOCATIONS[0]) & set(judge.prompt), "not invoked"
