"""Compiles grammars off the event loop and the engine's thread, each once for a tokenizer, and keeps the last ones."""

import asyncio
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

from manylora.server.engine.grammar.compiled import CompiledGrammar
from manylora.server.engine.grammar.grammar import Grammar, GrammarRefused
from manylora.server.engine.grammar.tables import Tables, TokenSet
from manylora.server.errors import QueueFull
from manylora.server.threads import step_back

THREADS = 2
MOST_WAITING = 64
"""Grammars that wait to be compiled, over which more are refused."""
MOST_GRAMMARS = 256
MOST_CHARACTERS = 8 << 20
"""Of the kept grammars' texts together: what the library makes of a grammar grows with it."""
MOST_TABLES = 4
"""Adapters' tokenizers whose tables are kept, the last that were used: 10 to 50 MB each."""
SECONDS = 10.0

_Key = tuple[str, Grammar]


class Grammars:
    """Grammars over the ids of one model. Methods may be called from any thread."""

    def __init__(self, vocab_size: int, seconds: float = SECONDS) -> None:
        """``seconds``: that a request waits for its grammar at most."""
        self._vocab_size = vocab_size
        self._seconds = seconds
        self._threads = ThreadPoolExecutor(THREADS, "grammar", step_back)
        self._lock = threading.Lock()
        self._tables_lock = threading.Lock()
        self._kept: OrderedDict[_Key, Future[CompiledGrammar]] = OrderedDict()
        self._waiting = 0
        self._characters = 0
        self._tables: OrderedDict[str, Tables] = OrderedDict()
        self._base: str | None = None
        self.compiled = 0
        """How many were compiled since the start."""

    def prepare(self, tokens: TokenSet) -> None:
        """Build the base's tables (blocking), which are kept for good: before requests come."""
        self._base = tokens.key
        self._tables_of(tokens)

    async def compile(self, grammar: Grammar, tokens: TokenSet) -> CompiledGrammar:
        """Return a grammar that is ready to be followed. Raises GrammarRefused and QueueFull."""
        future = self._compiling(grammar, tokens)
        try:
            async with asyncio.timeout(self._seconds):
                return await asyncio.shield(asyncio.wrap_future(future))
        except TimeoutError:
            raise GrammarRefused(
                f"it takes longer than {self._seconds:g} s to be compiled: give a simpler one, or try again"
            ) from None

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _compiling(self, grammar: Grammar, tokens: TokenSet) -> "Future[CompiledGrammar]":
        key = (tokens.key, grammar)
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None and not _to_do_again(kept):
                self._kept.move_to_end(key)
                return kept
            if self._waiting >= MOST_WAITING:
                raise QueueFull(
                    f"{self._waiting} grammars wait to be compiled; try again later", retry_after=1
                )
            self._waiting += 1
            future = self._threads.submit(self._compile, grammar, tokens)
            if kept is None:
                self._characters += len(grammar.text)
            self._kept[key] = future
            self._kept.move_to_end(key)
            while len(self._kept) > 1 and (
                len(self._kept) > MOST_GRAMMARS or self._characters > MOST_CHARACTERS
            ):
                (_, oldest), _ = self._kept.popitem(last=False)
                self._characters -= len(oldest.text)
        return future

    def _compile(self, grammar: Grammar, tokens: TokenSet) -> CompiledGrammar:
        try:
            found = CompiledGrammar(grammar, self._tables_of(tokens))
        finally:
            with self._lock:
                self._waiting -= 1
        self.compiled += 1
        return found

    def _tables_of(self, tokens: TokenSet) -> Tables:
        """Return a tokenizer's tables; two threads that need them build them once."""
        with self._tables_lock:
            found = self._tables.get(tokens.key)
            if found is None:
                found = self._tables[tokens.key] = Tables.of(tokens, self._vocab_size)
            self._tables.move_to_end(tokens.key)
            while len(self._tables) > MOST_TABLES + 1:
                oldest = next(key for key in self._tables if key != self._base)
                del self._tables[oldest]
            return found


def _to_do_again(future: "Future[CompiledGrammar]") -> bool:
    """Say whether what is kept is of no use: its refusal is, a fault or a limit met later isn't."""
    if not future.done():
        return False
    if future.cancelled():
        return True
    error = future.exception()
    return future.result().broken if error is None else not isinstance(error, GrammarRefused)
