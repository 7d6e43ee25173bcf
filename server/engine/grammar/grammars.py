"""Compiles grammars off the event loop and the engine's thread, each once for a tokenizer, and keeps the last ones.

Tenants share none: an answer that begins early would tell what another asked, and what answers learn of a grammar, and
its limit, they have in common. They have turns at the threads, and who keeps the most is the first to lose.
"""

import asyncio
import threading
import time
from collections import Counter, OrderedDict, deque
from concurrent.futures import Future, ThreadPoolExecutor

from manylora.server.engine.grammar.compiled import CompiledGrammar
from manylora.server.engine.grammar.grammar import Grammar, GrammarRefused
from manylora.server.engine.grammar.tables import Tables, TokenSet
from manylora.server.errors import QueueFull
from manylora.server.threads import step_back

THREADS = 2
MOST_WAITING = 64
"""Grammars that wait to be compiled, over which more are refused."""
MOST_OF_ONE = MOST_WAITING // 2
"""Of them one tenant's."""
RESERVE = MOST_WAITING // 4
"""Over them, for tenants of whose none waits."""
MOST_GRAMMARS = 256
MOST_CHARACTERS = 8 << 20
"""Of the kept grammars' texts together: what the library makes of a grammar grows with it."""
MOST_TABLES = 4
"""Adapters' tokenizers whose tables are kept, the last that were used: 10 to 50 MB each."""
SECONDS = 10.0

_Key = tuple[str, str, Grammar]
"""Tenant, tokenizer, grammar."""


class _Compiling(Future[CompiledGrammar]):
    began: float | None = None
    """When its turn came."""


_Work = tuple[_Compiling, Grammar, TokenSet]


class Grammars:
    """Grammars over the ids of one model. Methods may be called from any thread."""

    def __init__(self, vocab_size: int, seconds: float = SECONDS) -> None:
        """``seconds``: that a request waits for its grammar at most, and that a grammar may take."""
        self._vocab_size = vocab_size
        self._seconds = seconds
        self._threads = ThreadPoolExecutor(THREADS, "grammar", step_back)
        self._lock = threading.Lock()
        self._tables_lock = threading.Lock()
        self._kept: OrderedDict[_Key, _Compiling] = OrderedDict()
        self._waiting: Counter[str] = Counter()
        """By tenant, those under way included."""
        self._queues: OrderedDict[str, deque[_Work]] = OrderedDict()
        """Of each tenant that waits, who has the next turn first."""
        self._characters = 0
        self._tables: OrderedDict[str, Tables] = OrderedDict()
        self._base: str | None = None
        self.compiled = 0
        """How many were compiled since the start."""

    def prepare(self, tokens: TokenSet) -> None:
        """Build the base's tables (blocking), which are kept for good: before requests come."""
        self._base = tokens.key
        self._tables_of(tokens)

    async def compile(self, grammar: Grammar, tokens: TokenSet, tenant: str = "") -> CompiledGrammar:
        """Return a grammar that is ready to be followed, and is this tenant's alone; "": of all who are none's.

        Raises GrammarRefused and QueueFull.
        """
        future = self._compiling(grammar, tokens, tenant)
        try:
            async with asyncio.timeout(self._seconds):
                return await asyncio.shield(asyncio.wrap_future(future))
        except TimeoutError:
            if future.began is None or time.monotonic() - future.began < self._seconds / 2:
                raise QueueFull(
                    f"other grammars took the {self._seconds:g} s that a request waits for its own; try again later",
                    retry_after=1,
                ) from None
            raise GrammarRefused(
                f"it takes longer than {self._seconds:g} s to be compiled: give a simpler one, or try again"
            ) from None

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for queue in self._queues.values():
                for future, _, _ in queue:
                    future.cancel()
            self._queues.clear()

    def _compiling(self, grammar: Grammar, tokens: TokenSet, tenant: str) -> _Compiling:
        key = (tenant, tokens.key, grammar)
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None and not _to_do_again(kept):
                self._kept.move_to_end(key)
                return kept
            self._check_room(tenant)
            future = _Compiling()
            self._threads.submit(self._work)
            self._waiting[tenant] += 1
            self._queues.setdefault(tenant, deque()).append((future, grammar, tokens))
            if kept is None:
                self._characters += len(grammar.text)
            self._kept[key] = future
            self._kept.move_to_end(key)
            while len(self._kept) > 1 and (
                len(self._kept) > MOST_GRAMMARS or self._characters > MOST_CHARACTERS
            ):
                self._forget_one()
        return future

    def _check_room(self, tenant: str) -> None:
        waiting, own = self._waiting.total(), self._waiting[tenant]
        most = MOST_WAITING if own else MOST_WAITING + RESERVE
        # What belongs to no tenant is bounded with all others alone.
        if waiting >= most or (tenant and own >= MOST_OF_ONE):
            count = own if tenant and own else waiting
            raise QueueFull(f"{count} grammars wait to be compiled; try again later", retry_after=1)

    def _forget_one(self) -> None:
        """Forget the oldest grammar of the tenant that keeps the most; the newest of all stays."""
        older = list(self._kept)[:-1]
        held: Counter[str] = Counter()
        for tenant, _, grammar in older:
            held[tenant] += MOST_CHARACTERS // MOST_GRAMMARS + len(grammar.text)
        most = max(held.values())
        oldest = next(key for key in older if held[key[0]] == most)
        del self._kept[oldest]
        self._characters -= len(oldest[2].text)

    def _work(self) -> None:
        """Compile one grammar: the first of the tenant whose turn it is."""
        with self._lock:
            if not self._queues:  # closed
                return
            tenant, queue = self._queues.popitem(last=False)
            future, grammar, tokens = queue.popleft()
            if queue:
                self._queues[tenant] = queue
        future.began = time.monotonic()
        future.set_running_or_notify_cancel()
        try:
            found = CompiledGrammar(grammar, self._tables_of(tokens))
        except BaseException as error:
            self._done_with(tenant)
            future.set_exception(error)
        else:
            self.compiled += 1
            self._done_with(tenant)
            future.set_result(found)

    def _done_with(self, tenant: str) -> None:
        with self._lock:
            self._waiting[tenant] -= 1
            self._waiting += Counter()  # without those at none

    def _tables_of(self, tokens: TokenSet) -> Tables:
        """Return a tokenizer's tables; two threads that need them build them once."""
        with self._tables_lock:
            found = self._tables.get(tokens.key)
            if found is None:
                found = self._tables[tokens.key] = Tables.of(tokens, tokens.own_size or self._vocab_size)
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
