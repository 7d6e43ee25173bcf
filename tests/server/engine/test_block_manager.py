"""Blocks: the books balance whatever happens, and a prefix is only shared by those who may."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from manylora.server.engine.activation import AdapterKey, Stages
from manylora.server.engine.block_manager import SWEPT, BlockManager
from manylora.server.kernels.step import NULL_BLOCK

BASE: AdapterKey = ()
ADAPTERS: tuple[AdapterKey, ...] = (BASE, ((1, 1.0),), ((1, 0.5),), ((2, 1.0),), ((1, 1.0), (2, 1.0)))


def filled(blocks: BlockManager, number: int, adapters: AdapterKey, tokens: list[int]) -> int:
    """Compute a whole prompt as the engine would; return its cached tokens."""
    stages = Stages.throughout(adapters)
    prefix = blocks.match(stages, tokens)
    assert blocks.can_allocate(prefix, len(tokens))
    cached = blocks.allocate(number, stages, prefix)
    blocks.grow(number, len(tokens))
    blocks.commit(number, tokens, len(tokens))
    return cached


def test_a_prompt_seen_before_is_found_but_for_its_last_token() -> None:
    blocks = BlockManager(8, 4)
    tokens = list(range(8))
    assert filled(blocks, 1, BASE, tokens) == 0
    assert filled(blocks, 2, BASE, tokens) == 4
    assert filled(blocks, 3, BASE, [*tokens, 9]) == 8
    assert blocks.table(1)[0] == blocks.table(2)[0] == blocks.table(3)[0]
    assert blocks.table(1)[1] != blocks.table(2)[1]
    blocks.check_integrity()


def test_adapters_weights_and_base_share_nothing() -> None:
    blocks = BlockManager(64, 4)
    for number, adapters in enumerate(ADAPTERS):
        assert filled(blocks, number, adapters, list(range(9))) == 0
    taken = [block for number in range(len(ADAPTERS)) for block in blocks.table(number)]
    assert len(set(taken)) == len(taken)


def test_forgetting_an_adapter_leaves_the_others_prefixes() -> None:
    blocks = BlockManager(64, 4)
    for number, adapters in enumerate(ADAPTERS):
        filled(blocks, number, adapters, list(range(9)))
        blocks.free(number)
    blocks.forget_adapter(1)
    blocks.check_integrity()
    hits = [len(blocks.match(Stages.throughout(adapters), list(range(9)))) for adapters in ADAPTERS]
    assert hits == [2, 0, 0, 2, 0]
    assert blocks.num_free == 64


class Counting(dict[int, object]):
    """A dict that counts how often it is looked at, block by block or as a whole."""

    looks = 0

    def items(self) -> Any:
        self.looks += len(self)
        return super().items()

    def get(self, *arguments: Any) -> Any:
        self.looks += 1
        return super().get(*arguments)


@pytest.mark.parametrize("own", [10, 3 * SWEPT])
def test_forgetting_takes_as_long_as_an_adapter_has_blocks_and_never_long(own: int) -> None:
    """With many blocks of others in the cache; what is left over is given back step by step, or when it is needed."""
    others, size = 20_000, 2
    blocks = BlockManager(others + own + 10, size)
    filled(blocks, 1, ((2, 1.0),), list(range(others * size)))
    filled(blocks, 2, ((1, 1.0),), list(range(own * size)))
    for number in (1, 2):
        blocks.free(number)
    blocks._cached = counted = Counting(blocks._cached)  # type: ignore[assignment]  # a time would depend on the machine
    blocks.forget_adapter(1)
    assert counted.looks <= min(own, SWEPT)
    assert blocks.num_cached == others + own - min(own, SWEPT)
    blocks.check_integrity()
    # Blocks of the one that is gone are taken before those of an adapter that somebody may ask for.
    blocks.allocate(3, Stages.throughout(BASE), [])
    blocks.grow(3, (own + 10) * size)
    assert blocks.num_cached == others
    blocks.check_integrity()
    assert len(blocks.match(Stages.throughout(((2, 1.0),)), [*range(others * size), 0])) == others


def test_a_swept_block_that_has_a_new_owner_keeps_its_prefix() -> None:
    blocks = BlockManager(SWEPT + 20, 2)
    filled(blocks, 1, ((1, 1.0), (2, 1.0)), list(range(2 * (SWEPT + 10))))
    blocks.free(1)
    blocks.forget_adapter(1)
    assert blocks.num_cached == 10
    blocks.forget_adapter(2)
    assert blocks.num_cached == 0
    filled(blocks, 2, ((3, 1.0),), list(range(2 * (SWEPT + 20))))
    blocks.sweep()
    assert blocks.num_cached == SWEPT + 20
    blocks.check_integrity()


def test_the_longest_unused_prefix_goes_first_and_its_end_before_its_beginning() -> None:
    blocks = BlockManager(4, 2)
    filled(blocks, 1, BASE, [1, 2, 3, 4])
    filled(blocks, 2, BASE, [5, 6, 7, 8])
    blocks.free(1)
    blocks.free(2)
    filled(blocks, 3, BASE, [9, 9])
    assert len(blocks.match(Stages.throughout(BASE), [1, 2, 3, 4, 0])) == 1
    assert len(blocks.match(Stages.throughout(BASE), [5, 6, 7, 8, 0])) == 2


def test_the_null_block_is_never_anybodys() -> None:
    blocks = BlockManager(3, 2)
    filled(blocks, 1, BASE, [1, 2, 3, 4, 5])
    assert sorted(blocks.table(1)) == [1, 2, 3]
    assert blocks.num_free == 0
    blocks.free(1)
    filled(blocks, 2, BASE, [6, 7, 8, 9, 0])
    assert NULL_BLOCK not in blocks.table(2)


class Blocks(RuleBasedStateMachine):
    """Sequences come, grow, and go in any order; what a block holds is tracked beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(12, 2)
        self.tokens: dict[int, list[int]] = {}
        self.stages: dict[int, Stages] = {}
        self.content: dict[int, list[tuple[int, AdapterKey]]] = {}
        """Of each block: its tokens and all before them, with the adapters that acted on each."""
        self.born = 0

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10),
        adapters=st.sampled_from(ADAPTERS),
        point=st.integers(0, 6),
    )
    def begin(self, tokens: list[int], adapters: AdapterKey, point: int) -> None:
        """Adapters act from a place on: from the first token, or somewhere in the prompt, where a block may begin."""
        stages = Stages((0, point), ((), adapters)) if point else Stages.throughout(adapters)
        prefix = self.blocks.match(stages, tokens)
        assert len(prefix) * 2 < len(tokens)
        for i, block in enumerate(prefix):
            assert self.content[block] == _acted_on(tokens[: 2 * i + 2], stages), "another's KV"
        if not self.blocks.can_allocate(prefix, len(tokens)):
            return
        self.born += 1
        self.blocks.allocate(self.born, stages, prefix)
        self.blocks.grow(self.born, len(tokens))
        self.tokens[self.born], self.stages[self.born] = tokens, stages
        self._compute(self.born)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), token=st.integers(0, 1))
    def append(self, data: st.DataObject, token: int) -> None:
        number = data.draw(st.sampled_from(sorted(self.tokens)))
        if self.blocks.can_grow(number, len(self.tokens[number]) + 1):
            self.tokens[number].append(token)
            self.blocks.grow(number, len(self.tokens[number]))
            self._compute(number)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.tokens)))
        self.blocks.free(number)
        del self.tokens[number], self.stages[number]

    @rule(adapter_id=st.integers(1, 2))
    def forget(self, adapter_id: int) -> None:
        self.blocks.forget_adapter(adapter_id)
        for adapters in ADAPTERS:
            if any(each == adapter_id for each, _ in adapters):
                assert not self.blocks.match(Stages.throughout(adapters), [0] * 9)

    @invariant()
    def books_balance(self) -> None:
        self.blocks.check_integrity()
        used = {block for number in self.tokens for block in self.blocks.table(number)}
        assert len(used) + self.blocks.num_free == 12

    def _compute(self, number: int) -> None:
        tokens, stages = self.tokens[number], self.stages[number]
        for i, block in enumerate(self.blocks.table(number)):
            if len(tokens) >= 2 * i + 2:
                self.content[block] = _acted_on(tokens[: 2 * i + 2], stages)
        self.blocks.commit(number, tokens, len(tokens))


def _acted_on(tokens: list[int], stages: Stages) -> list[tuple[int, AdapterKey]]:
    return [(token, stages.at(place)) for place, token in enumerate(tokens)]


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
