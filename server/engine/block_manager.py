"""Who owns which KV block, and which blocks hold a prefix that may be used again. Integers only; no torch.

Blocks are numbered from 1: the null block is never anybody's.
A cached block is known by (entry of the block before it, the adapters that act on its tokens, the tokens); the first
one by the scope instead of an entry: what one scope has computed is never found by another. Where adapters begin to act
in the middle of a prompt (engine/activation.py), the blocks before that are the base's, for all of that scope.
Entry numbers are never used again and tokens are compared, so a hit is never a mere equality of hashes.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from manylora.server.engine.activation import AdapterKey, Regime, Stages
from manylora.server.kernels.step import NULL_BLOCK

_Parent = int | str
_Key = tuple[_Parent, Regime, tuple[int, ...]]
SWEPT = 1024
"""Blocks of a forgotten adapter that are given back at a time: about a millisecond's work."""
AUDITED = 1024
"""Blocks whose books are checked at a time: the same."""


@dataclass(slots=True)
class _Cached:
    entry: int
    key: _Key

    @property
    def adapters(self) -> AdapterKey:
        """All that had a part in it: who acts on a token acts on all later ones."""
        return self.key[1][-1][1]


@dataclass(slots=True)
class _Table:
    blocks: "array[int]"
    """int32: what a step copies as it is."""
    stages: Stages
    parent: _Parent
    """Entry of the last block that is in the cache, or the scope if none is."""
    known: int
    """Blocks whose content has been offered to the cache."""


class BlockManager:
    """Blocks of ``block_size`` tokens with reference counts; freed blocks that are cached are reused last."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"need at least one block of one token, got {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._refs = array("i", [0]) * (num_blocks + 1)
        self._empty = array("i", range(num_blocks, NULL_BLOCK, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Cached blocks that nobody uses, the longest unused first."""
        self._cached: dict[int, _Cached] = {}
        self._by_key: dict[_Key, int] = {}
        self._by_adapter: dict[int, set[int]] = {}
        """Cached blocks of each adapter, those of its mixtures with others included."""
        self._forgotten: list[tuple[int, set[int]]] = []
        """Adapters that are gone, with those of their blocks that are still to be given back."""
        self._tables: dict[int, _Table] = {}
        self._entries = 0
        self.dropped = 0
        """How many blocks have left the prefix cache so far: while that stays, what was found is still there."""
        self.queried_tokens = 0
        self.hit_tokens = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be had now, cached ones included."""
        return len(self._empty) + len(self._idle)

    @property
    def num_cached(self) -> int:
        """Blocks that hold a reusable prefix, in use or not."""
        return len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def table(self, sequence: int) -> "array[int]":
        """Return the sequence's blocks in order. Not to be changed."""
        return self._tables[sequence].blocks

    def match(
        self, stages: Stages, token_ids: Sequence[int], scope: str = "", known: Sequence[int] = ()
    ) -> list[int]:
        """Return the scope's cached blocks that begin ``token_ids``; at least one token is left to compute.

        ``known`` are blocks that this found for them before, since when none was ``dropped``: it goes on behind them.
        """
        found: list[int] = list(known)
        parent: _Parent = self._cached[found[-1]].entry if found else scope
        size = self.block_size
        for start in range(len(found) * size, len(token_ids) - size, size):
            regime = stages.within(start, start + size)
            block = self._by_key.get((parent, regime, tuple(token_ids[start : start + size])))
            if block is None:
                break
            found.append(block)
            parent = self._cached[block].entry
        return found

    def can_allocate(self, prefix: Sequence[int], num_tokens: int) -> bool:
        """Say whether a sequence can take ``prefix`` (from ``match``) and grow to ``num_tokens``."""
        taken = sum(1 for block in prefix if self._refs[block] == 0)
        return self.blocks_for(num_tokens) - len(prefix) <= self.num_free - taken

    def allocate(self, sequence: int, stages: Stages, prefix: Sequence[int], scope: str = "") -> int:
        """Open a sequence's table with cached blocks of its scope; return the tokens that they hold."""
        assert sequence not in self._tables, "allocated twice"
        for block in prefix:
            if self._refs[block] == 0:
                del self._idle[block]
            self._refs[block] += 1
        parent: _Parent = self._cached[prefix[-1]].entry if prefix else scope
        self._tables[sequence] = _Table(array("i", prefix), stages, parent, len(prefix))
        return len(prefix) * self.block_size

    def count_query(self, num_tokens: int, num_hit: int) -> None:
        """Note for the statistics that a prompt was looked up."""
        self.queried_tokens += num_tokens
        self.hit_tokens += num_hit

    def can_grow(self, sequence: int, num_tokens: int) -> bool:
        """Say whether the sequence's table can be made to hold ``num_tokens``."""
        return self.blocks_for(num_tokens) - len(self._tables[sequence].blocks) <= self.num_free

    def grow(self, sequence: int, num_tokens: int) -> int:
        """Make the table hold ``num_tokens``; return how many it holds. Ask ``can_grow`` first."""
        blocks = self._tables[sequence].blocks
        for _ in range(self.blocks_for(num_tokens) - len(blocks)):
            blocks.append(self._take())
        return len(blocks) * self.block_size

    def commit(self, sequence: int, token_ids: Sequence[int], num_computed: int) -> None:
        """Offer the blocks that are full now to the prefix cache."""
        table = self._tables[sequence]
        size = self.block_size
        while (table.known + 1) * size <= num_computed:
            start = table.known * size
            regime = table.stages.within(start, start + size)
            key = (table.parent, regime, tuple(token_ids[start : start + size]))
            twin = self._by_key.get(key)
            if twin is None:
                block = table.blocks[table.known]
                self._entries += 1
                self._cached[block] = cached = _Cached(self._entries, key)
                self._by_key[key] = twin = block
                for adapter_id, _ in cached.adapters:
                    self._by_adapter.setdefault(adapter_id, set()).add(block)
            table.parent = self._cached[twin].entry
            table.known += 1

    def free(self, sequence: int) -> None:
        """Close the sequence's table. Ends before beginnings, so that a prefix outlives what follows it."""
        for block in reversed(self._tables.pop(sequence).blocks):
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if block in self._cached:
                    self._idle[block] = None
                else:
                    self._empty.append(block)

    def forget_adapter(self, adapter_id: int) -> None:
        """Drop every cached prefix that was computed with the adapter: up to SWEPT now, ``sweep`` the others.

        Nobody can find those in between: an adapter's id is never used again.
        """
        blocks = self._by_adapter.pop(adapter_id, None)
        if blocks is not None:
            self._forgotten.append((adapter_id, blocks))
            self.sweep()

    def sweep(self) -> None:
        """Give back up to SWEPT blocks of forgotten adapters. The engine calls it in each step."""
        for _ in range(SWEPT):
            if not self._forgotten:
                return
            adapter_id, blocks = self._forgotten[-1]
            block = blocks.pop()
            if not blocks:
                self._forgotten.pop()
            cached = self._cached.get(block)
            # It may have been taken meanwhile, as blocks that nobody has used for long are, and hold another's prefix.
            if cached is not None and any(each == adapter_id for each, _ in cached.adapters):
                self._uncache(block)
                if block in self._idle:
                    del self._idle[block]
                    self._empty.append(block)

    def audit(self) -> Iterator[None]:
        """Check the books in parts of a millisecond or so; raises AssertionError where they don't balance.

        Each part holds by itself: anything may happen between two of them.
        """
        self._check_counts()
        yield
        for start in range(1, self.num_blocks + 1, AUDITED):
            self._check_blocks(range(start, min(start + AUDITED, self.num_blocks + 1)))
            yield
        for adapter_id in list(self._by_adapter):
            blocks = list(self._by_adapter.get(adapter_id, ()))
            for start in range(0, len(blocks), AUDITED):
                self._check_index(adapter_id, blocks[start : start + AUDITED])
                yield

    def check_integrity(self) -> None:
        """Raise AssertionError if the books do not balance."""
        for _ in self.audit():
            pass

    def _check_counts(self) -> None:
        """Hold reference counts against the tables, and the numbers of free and used blocks against each other."""
        owned = [np.frombuffer(t.blocks, dtype=np.int32) for t in self._tables.values() if len(t.blocks)]
        refs, size = np.frombuffer(self._refs, dtype=np.int32), self.num_blocks + 1
        counts = (
            np.bincount(np.concatenate(owned), minlength=size) if owned else np.zeros(size, dtype=np.int32)
        )
        assert np.array_equal(counts, refs), "reference counts differ from the tables"
        assert refs[NULL_BLOCK] == 0, "a sequence owns the null block"
        empty = np.array(self._empty, dtype=np.int32)
        assert len(np.unique(empty)) == len(empty), "a block is free twice"
        assert not refs[empty].any(), "a block is free while in use"
        assert self.num_free + np.count_nonzero(refs) == self.num_blocks, (
            "a block is lost, or free while in use"
        )
        assert len(self._by_key) == len(self._cached), "the prefix index is wrong"

    def _check_blocks(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            cached = self._cached.get(block)
            idle = cached is not None and self._refs[block] == 0
            assert (block in self._idle) == idle, (
                "a cached block is idle while in use, or not though nobody uses it"
            )
            if cached is None:
                continue
            assert self._by_key.get(cached.key) == block, "the prefix index is wrong"
            for adapter_id, _ in cached.adapters:
                swept = any(each == adapter_id and block in gone for each, gone in self._forgotten)
                assert swept or block in self._by_adapter.get(adapter_id, ()), (
                    "the index of adapters' blocks is wrong"
                )

    def _check_index(self, adapter_id: int, blocks: Iterable[int]) -> None:
        for block in blocks:
            if block in self._by_adapter.get(adapter_id, ()):
                cached = self._cached.get(block)
                known = cached is not None and any(each == adapter_id for each, _ in cached.adapters)
                assert known, "the index of adapters' blocks is wrong"

    def _take(self) -> int:
        if not self._empty:
            self.sweep()
        if self._empty:
            block = self._empty.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._uncache(block)
        self._refs[block] = 1
        return block

    def _uncache(self, block: int) -> None:
        cached = self._cached.pop(block)
        self.dropped += 1
        del self._by_key[cached.key]
        for adapter_id, _ in cached.adapters:
            blocks = self._by_adapter.get(adapter_id)
            if blocks is not None:
                blocks.discard(block)
                if not blocks:
                    del self._by_adapter[adapter_id]
