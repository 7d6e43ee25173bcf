"""Audits of the blocks' books: in parts that take no step long, and none of what may be wrong escapes them."""

from collections.abc import Callable

import pytest

from manylora.server.engine.activation import AdapterKey, Stages
from manylora.server.engine.block_manager import AUDITED, BlockManager
from tests.server.engine.test_block_manager import BASE, Counting, filled

ONE: AdapterKey = ((1, 1.0),)
STAGES = Stages.throughout(ONE)


def used(num_blocks: int = 64) -> BlockManager:
    """Blocks in use, idle and empty, of an adapter and of the base."""
    blocks = BlockManager(num_blocks, 4)
    filled(blocks, 1, ONE, list(range(17)))
    filled(blocks, 2, BASE, list(range(17)))
    filled(blocks, 3, ONE, list(range(100, 117)))
    blocks.free(3)
    return blocks


def _lose(blocks: BlockManager) -> None:
    blocks._empty.pop()


def _free_twice(blocks: BlockManager) -> None:
    blocks._empty[0] = blocks._empty[1]


def _free_in_use(blocks: BlockManager) -> None:
    blocks._empty[0] = blocks.table(1)[4]


def _count_wrong(blocks: BlockManager) -> None:
    blocks._refs[blocks.table(2)[0]] += 1


def _idle_in_use(blocks: BlockManager) -> None:
    blocks._idle[blocks.table(1)[0]] = None
    blocks._empty.pop()


def _forget_a_key(blocks: BlockManager) -> None:
    blocks._by_key.popitem()


def _wrong_key(blocks: BlockManager) -> None:
    first = next(iter(blocks._by_key))
    blocks._by_key[first] = blocks.table(2)[2]


def _forget_an_adapters_block(blocks: BlockManager) -> None:
    blocks._by_adapter[1].pop()


def _give_an_adapter_anothers_block(blocks: BlockManager) -> None:
    blocks._by_adapter[1].add(blocks.table(2)[0])


@pytest.mark.parametrize(
    "damage",
    [
        _lose,
        _free_twice,
        _free_in_use,
        _count_wrong,
        _idle_in_use,
        _forget_a_key,
        _wrong_key,
        _forget_an_adapters_block,
        _give_an_adapter_anothers_block,
    ],
)
def test_what_is_wrong_in_the_books_is_found(damage: Callable[[BlockManager], None]) -> None:
    blocks = used()
    blocks.check_integrity()
    damage(blocks)
    with pytest.raises(AssertionError):
        blocks.check_integrity()


def test_an_audit_goes_on_while_blocks_change_hands() -> None:
    """Whatever happens between two parts, sound books stay sound."""
    blocks = used(10 * AUDITED)
    parts = 0
    for parts, _ in enumerate(blocks.audit(), start=1):
        filled(blocks, 10 + parts, ONE if parts % 2 else BASE, list(range(parts, parts + 41)))
        if parts > 2:
            blocks.free(8 + parts)
        if parts == 5:
            blocks.forget_adapter(1)
    assert parts >= 10
    blocks.check_integrity()


def test_a_prefix_that_is_known_is_not_looked_up_again() -> None:
    """As long as nothing was dropped; what was computed behind it meanwhile is found."""
    blocks = BlockManager(64, 4)
    filled(blocks, 1, ONE, list(range(25)))
    asked = list(range(33))
    known = blocks.match(STAGES, asked)
    before = blocks.dropped
    filled(blocks, 2, ONE, list(range(29)))
    assert blocks.dropped == before
    blocks._by_key = index = Counting(blocks._by_key)  # type: ignore[arg-type,assignment]
    assert blocks.match(STAGES, asked, known=known) == [*known, blocks.table(2)[6]]
    assert index.looks <= 2
    blocks.free(1)
    blocks.free(2)
    filled(blocks, 3, BASE, list(range(250)))
    assert blocks.dropped > before
