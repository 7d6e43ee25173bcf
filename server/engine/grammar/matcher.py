"""One answer's place in its grammar: which tokens may follow, and what a token does to it.

Which ids end an answer is the request's: they do so only where the grammar lets it end.
"""

import logging
from collections.abc import Iterable, Sequence
from enum import Enum, auto
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from manylora.server.engine.grammar.tables import Tables

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

log = logging.getLogger(__name__)
_UNSPELLABLE = "none of the model's tokens can spell what must follow"
_ENDLESS = "nothing may follow, and the model has no token that ends a text"
Words = NDArray[np.int32]
"""Bits by token id, the lowest first: those that are set may follow."""


class Standing(Enum):
    """What a token is to its text."""

    OPEN = auto()
    """What it is by itself: no grammar has a say."""
    WITHIN = auto()
    """Part of it, even if it ends others."""
    ENDS = auto()
    """It ends it, and is no part of it."""
    COMPLETES = auto()
    """Part of it, and nothing may follow."""


class GrammarFault(Exception):
    """A grammar that can't go on, by a limit or a fault of the library's. It concerns one request alone."""


class Matcher:
    """Follows one answer. Not thread-safe."""

    def __init__(self, native: "LLMatcher", tables: Tables, ends: Iterable[int], min_tokens: int) -> None:
        """``ends`` end the answer, once it has ``min_tokens`` and the grammar lets it end.

        Tokenizers and configurations name ids that the model has no row for: these never come.
        """
        self.native = native
        self.vocab_size = tables.vocab_size
        self._eos_id = tables.eos_id
        self._ends = frozenset(token_id for token_id in ends if 0 <= token_id < tables.vocab_size)
        self._min_tokens = min_tokens
        self._forces = tables.forces
        self._count = 0
        self._acting: frozenset[int] = frozenset()
        """Ids that end the answer if the next token is one of them."""

    def complete_mask(self, row: NDArray[np.uint32]) -> None:
        """Let the ids that end the answer follow where they may; ``row`` is the library's mask. Raises GrammarFault."""
        self._acting = frozenset()
        if self.native.is_error():
            raise GrammarFault(said(self.native.get_error()))
        if self.native.is_accepting():
            row[self._eos_id >> 5] &= ~np.uint32(1 << (self._eos_id & 31))
            alone = not row.any()
            if alone or self._count >= self._min_tokens:
                self._acting = self._ends
            if alone and not self._acting:
                if self._eos_id >= self.vocab_size:
                    raise GrammarFault(_ENDLESS)
                self._acting = frozenset({self._eos_id})
            for token_id in self._acting:
                row[token_id >> 5] |= np.uint32(1 << (token_id & 31))
        elif not row.any():
            raise GrammarFault(_UNSPELLABLE)

    def take(self, token_id: int) -> Standing:
        """Go on by a token. Raises GrammarFault."""
        acting, self._acting = self._acting, frozenset()
        if token_id in acting:
            return Standing.ENDS
        if not self.native.consume_token(token_id) or self.native.is_error():
            raise GrammarFault(said(self.native.get_error()))
        self._count += 1
        return Standing.COMPLETES if self.native.is_stopped() else Standing.WITHIN

    @property
    def may_end(self) -> bool:
        """Whether the text so far is one of the grammar's."""
        return bool(self.native.is_accepting())

    def forced(self) -> Sequence[int]:
        """Return the tokens that must follow, one after the other: each is all that its mask would let."""
        return self.native.compute_ff_tokens() if self._forces else ()


ALONE = 8
"""Rows whose masks are computed faster, some 20 µs each as a rule, than other threads are woken."""


class Masks:
    """Computes the masks of a step's rows, beside the step."""

    def __init__(self, vocab_size: int, threads: int) -> None:
        # One id more than the model's: see Tables.eos_id.
        self._words = (vocab_size + 1 + 31) // 32
        self._threads = threads
        self._executor: LLExecutor | None = None
        self._buffer = np.zeros((0, self._words), dtype=np.int32)

    def fill(self, matchers: Sequence[Matcher]) -> tuple[Words, dict[int, GrammarFault]]:
        """Return [n, words], good until the next call, and the faults by row."""
        count = len(matchers)
        if len(self._buffer) < count:
            self._buffer = np.zeros((max(count, 2 * len(self._buffer)), self._words), dtype=np.int32)
        found, width = self._buffer[:count], 4 * self._words
        found[:] = 0
        if self._threads == 1 or count <= ALONE:
            first = found.ctypes.data
            for row, matcher in enumerate(matchers):
                matcher.native.unsafe_compute_mask_ptr(first + row * width, width)
        else:
            if self._executor is None:
                from llguidance import LLExecutor

                self._executor = LLExecutor(self._threads)
            rows = [(matcher.native, row) for row, matcher in enumerate(matchers)]
            self._executor.unsafe_compute_mask_ptr(rows, found.ctypes.data, width, count)
        faults: dict[int, GrammarFault] = {}
        for row, matcher in enumerate(matchers):
            try:
                matcher.complete_mask(found[row].view(np.uint32))
            except GrammarFault as fault:
                faults[row] = fault
            except Exception as error:  # no row's matcher may fail the others
                log.error("a mask could not be completed", exc_info=error)
                faults[row] = GrammarFault(said(f"{type(error).__name__}: {error}"))
        return found, faults


def said(error: str) -> str:
    """Return what the library says of a fault, in one line, without backtraces."""
    line = next((line for line in error.splitlines() if line.strip()), "it can't go on")
    return _UNSPELLABLE if line == "NoExtensionBias" else line[:300]
