"""Who owns which KV block, and which blocks hold a prefix that may be used again. Integers only; no torch.

Blocks are numbered from 1: the null block is never anybody's.
A cached block is known by (entry of the block before it, the adapters that act on its tokens, the tokens); the first
one by the scope instead of an entry: what one scope has computed is never found by another. Where adapters begin to act
in the middle of a prompt (engine/activation.py), the blocks before that are the base's, for all of that scope.
Entry numbers are never used again and tokens are compared, so a hit is never a mere equality of hashes.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from manylora.server.engine.activation import AdapterKey, Regime, Stages
from manylora.server.kernels.step import NULL_BLOCK

_Parent = int | str
_Key = tuple[_Parent, Regime, tuple[int, ...]]
SWEPT = 1024
"""Blocks of a forgotten adapter that are given back at a time: about a millisecond's work."""


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
        self._refs = [0] * (num_blocks + 1)
        self._empty = list(range(num_blocks, NULL_BLOCK, -1))
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

    def check_integrity(self) -> None:
        """Raise AssertionError if the books do not balance."""
        refs = [0] * (self.num_blocks + 1)
        for table in self._tables.values():
            for block in table.blocks:
                refs[block] += 1
        assert refs == self._refs, "reference counts differ from the tables"
        free = [*self._empty, *self._idle]
        assert len(free) == len(set(free)), "a block is free twice"
        unused = {block for block in range(1, self.num_blocks + 1) if refs[block] == 0}
        assert refs[NULL_BLOCK] == 0, "a sequence owns the null block"
        assert set(free) == unused, "a block is lost or free while in use"
        assert all(b in self._cached for b in self._idle), "an idle block is not cached"
        assert not any(b in self._cached for b in self._empty), "an empty block is cached"
        indexed = {(block, i) for i, blocks in self._by_adapter.items() for block in blocks}
        swept = {(block, i) for i, blocks in self._forgotten for block in blocks}
        cached = {(block, i) for block, c in self._cached.items() for i, _ in c.adapters}
        assert indexed <= cached <= indexed | swept, "the index of adapters' blocks is wrong"
        assert self._by_key == {c.key: b for b, c in self._cached.items()}, "the prefix index is wrong"

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
