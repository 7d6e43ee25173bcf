"""Adapters' example prompts become vectors, off the road of requests, and requests are held against them.

One task looks at the catalog after each change: it reads from the disk or has computed what is missing, one adapter
after the other, and lets go of what is no adapter's any more. A request that comes while its candidates are still being
read waits for them, for a while. Lives on the event loop; knows no HTTP and no tensors.
"""

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field

from manylora.adapters.manifest import AdapterManifest
from manylora.server.catalog.example_vectors import ExampleVectors, Vectors
from manylora.server.catalog.nearest import Board, Group, Near
from manylora.server.catalog.prompt_vectors import Floats
from manylora.server.catalog.said import Said
from manylora.server.catalog.types import Described, Routed
from manylora.server.errors import AdapterUnavailable, QueueFull, ServerError

log = logging.getLogger(__name__)
BOARDS = 32
"""Sets of candidates that are kept ready to be compared: callers who see the same adapters share one."""
AGAIN = 1.0
"""Seconds until examples that found the engine full are tried again."""
Compute = Callable[[Sequence[str]], Awaitable[Vectors]]
"""Returns the vectors of example prompts by form. Raises ServerError."""


@dataclass(frozen=True, slots=True)
class RoutingSettings:
    """How requests are held against examples."""

    base_name: str
    base: AdapterManifest
    """The base's own: which prompts are nobody's but its own."""
    forms: tuple[str, ...]
    """In which examples are read, each an array of vectors."""
    threshold: float
    """How near, from -1 to 1, an adapter must be that doesn't say so itself."""
    patience: float = 5.0
    """Seconds that a request waits for its candidates' examples to be read."""


@dataclass(slots=True)
class _Book:
    """How far the reading of examples is."""

    failed: dict[str, str] = field(default_factory=dict)
    """Why examples can't be read, by their keys."""
    settled: dict[str, asyncio.Event] = field(default_factory=dict)
    """Keys that somebody waits for."""

    def settle(self, key: str) -> None:
        waited = self.settled.pop(key, None)
        if waited is not None:
            waited.set()


@dataclass(frozen=True, slots=True)
class Contest:
    """Candidates with their vectors, the base's last: a request is held by these, whatever comes of them."""

    candidates: tuple[Described, ...]
    vectors: tuple[Vectors, ...]


class Routing:
    """Whose prompt is this? ``open`` it on the event loop; it follows the catalog until ``close``."""

    def __init__(self, vectors: ExampleVectors, settings: RoutingSettings, said: Said) -> None:
        self.settings = settings
        self._vectors = vectors
        self._said = said
        self._base = Described(settings.base_name, settings.base)
        self._book = _Book()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._boards: OrderedDict[object, Board] = OrderedDict()

    async def open(
        self, names: Collection[str], described: Callable[[], Sequence[Described]], compute: Compute
    ) -> None:
        """Begin to read the examples of what ``described`` returns, and of the base if there are any.

        ``names`` are those of all adapters that there are, whether they can be served or not.
        """
        await asyncio.to_thread(self._said.load, names)
        self._changed.set()
        self._task = asyncio.create_task(self._follow(described, compute))

    async def close(self) -> None:
        """Stop reading."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def look(self, new: str | None = None) -> None:
        """Have the catalog looked at: something in it is other than it was, and ``new`` is a name that was free."""
        if new is not None:
            self._said.forget(new)  # it was said of an adapter that is gone
        self._changed.set()

    async def say(self, name: str, manifest: AdapterManifest) -> None:
        """Have an adapter's description and examples be these, over what its files say. Raises OSError."""
        await asyncio.to_thread(self._said.say, name, manifest)
        self._changed.set()

    def manifest_of(self, name: str, own: AdapterManifest) -> AdapterManifest:
        """Return what counts of an adapter whose files say ``own``."""
        return self._said.of(name, own)

    def candidates(self, adapters: Sequence[Described]) -> tuple[Described, ...]:
        """Return those of the adapters that have examples, as what is said of them has it."""
        told = (Described(each.name, self._said.of(each.name, each.manifest)) for each in adapters)
        return tuple(each for each in told if each.manifest.examples)

    # For requests

    async def ready(self, candidates: Sequence[Described]) -> Contest:
        """Return the candidates whose examples are read, having waited a bounded time for those that were not yet.

        Raises AdapterUnavailable if there is none in the end.
        """
        waited = [self._wait_for(each) for each in (*candidates, self._base) if not self._is_settled(each)]
        if waited:
            self.look()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.settings.patience):
                    for each in waited:
                        await each.wait()
        found = tuple(each for each in candidates if each.key in self._vectors)
        if found and self._base.key in self._vectors:
            return Contest(found, tuple(self._vectors[each.key] for each in (*found, self._base)))
        reasons = [self._book.failed.get(each.key) for each in (*candidates, self._base)]
        reason = next((each for each in reasons if each is not None), None)
        if reason is not None:
            raise AdapterUnavailable(f"example prompts can't be read: {reason}; name a model", param="model")
        raise AdapterUnavailable(
            "example prompts are still being read: try again", param="model", retry_after=1
        )

    async def choose(self, contest: Contest, form: str, vector: Floats) -> Routed:
        """Return whose a prompt is: the nearest candidate's, or the base's."""
        board = await self._board(contest, form)
        nearest, second, *_ = board.rank(vector)
        threshold = self._threshold(contest, nearest)
        name = nearest.name if nearest.score >= threshold else self.settings.base_name
        return Routed(name, nearest.score, nearest.name, threshold, second)

    def _threshold(self, contest: Contest, nearest: Near) -> float:
        own = next(
            (each.manifest.threshold for each in contest.candidates if each.name == nearest.name), None
        )
        return self.settings.threshold if own is None else own

    async def _board(self, contest: Contest, form: str) -> Board:
        key = form, tuple((each.name, each.key) for each in contest.candidates)
        board = self._boards.pop(key, None)
        if board is None:
            names = [each.name for each in (*contest.candidates, self._base)]
            vectors = [each[form] for each in contest.vectors]
            groups = [Group(*each) for each in zip(names, vectors, strict=True)]
            board = await asyncio.to_thread(Board, groups)
        self._boards[key] = board
        while len(self._boards) > BOARDS:
            self._boards.popitem(last=False)
        return board

    def _is_settled(self, one: Described) -> bool:
        return one.key in self._vectors or one.key in self._book.failed

    def _wait_for(self, one: Described) -> asyncio.Event:
        return self._book.settled.setdefault(one.key, asyncio.Event())

    # In the background

    async def _follow(self, described: Callable[[], Sequence[Described]], compute: Compute) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                await self._catch_up(described, compute)
            except QueueFull:
                await asyncio.sleep(AGAIN)
                self._changed.set()
            except Exception as error:
                log.error("example prompts could not be followed", exc_info=error)
                await asyncio.sleep(AGAIN)

    async def _catch_up(self, described: Callable[[], Sequence[Described]], compute: Compute) -> None:
        adapters = self.candidates(described())
        wanted = {each.key: each for each in ((self._base, *adapters) if adapters else ())}
        await asyncio.to_thread(self._vectors.keep_only, wanted.keys())
        self._boards.clear()
        self._book.failed.clear()  # what failed may have been the moment's fault
        for key in self._book.settled.keys() - wanted.keys():
            self._book.settle(key)
        for one in wanted.values():
            if not self._is_settled(one):
                await self._learn(one, compute)
            self._book.settle(one.key)

    async def _learn(self, one: Described, compute: Compute) -> None:
        counts = dict.fromkeys(self.settings.forms, len(one.manifest.examples))
        if not self._vectors.has_room(sum(counts.values())):
            self._fail(one, "there is no memory for those of more adapters")
            return
        found = await asyncio.to_thread(self._vectors.read, one.key, counts)
        if found is not None:
            self._vectors.hold(one.key, found)
            return
        try:
            made = await compute(one.manifest.examples)
        except QueueFull:
            raise
        except ServerError as error:
            self._fail(one, error.message)
            return
        self._vectors.hold(one.key, made)
        with contextlib.suppress(OSError):  # the next start computes them again
            await asyncio.to_thread(self._vectors.write, one.key, made)

    def _fail(self, one: Described, why: str) -> None:
        log.warning("the example prompts of %s can't be read: %s", one.name, why)
        self._book.failed[one.key] = why
