"""A tokenizer that an adapter brings, in a process of its own.

Loading a large one holds an interpreter for a second, and what comes from outside may do worse.
"""

import asyncio
import json
import threading
from array import array
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manylora.server.errors import InvalidRequest, QueueFull
from manylora.server.tokenizer.lane import Lane
from manylora.server.tokenizer.tokenizer import TooManyTokens
from manylora.server.tokenizer.vocabulary import Vocabulary
from manylora.server.workers.pool import WorkerPool, WorkersBusy
from manylora.server.workers.process import WorkerDied, WorkerProcess, WorkerTimedOut

MODULE = "manylora.server.tokenizer.worker"
SECONDS = 60.0
"""For one question, loading included: a large tokenizer takes a few seconds at a low priority."""


class TokenizerFailed(Exception):
    """The tokenizer can't be loaded or used. The message says why."""


@dataclass(frozen=True, slots=True)
class Described:
    """What a tokenizer is, as far as this process needs to know."""

    fingerprint: str
    """Equal for tokenizers that make the same tokens of every text."""
    special_tokens: dict[str, str | list[str]]
    eos_id: int | None
    vocabulary: Vocabulary


class AdapterTokenizer:
    """A codec (see model_text.py). ``directory`` may change, if the same files are there. Any thread may call."""

    def __init__(self, key: str, directory: Path) -> None:
        """``key`` stands for the contents of the files in ``directory``."""
        self.key = key
        self.directory = directory
        self._pool = WorkerPool(lambda: WorkerProcess(MODULE), size=1, seconds=SECONDS)
        self._lock = threading.Lock()
        self._loading: Future[bytes] | None = None
        self._described: Described | None = None

    def described(self) -> Described:
        """Load the tokenizer if need be (blocking); return what it is. Raises TokenizerFailed, WorkersBusy."""
        try:
            return self._read(self._load().result())
        except WorkerDied as error:
            raise _failed(error) from error

    async def describe(self) -> Described:
        """Do what ``described`` does without blocking."""
        if self._described is not None:
            return self._described
        try:
            answer = await asyncio.shield(asyncio.wrap_future(self._load()))
        except WorkerDied as error:
            raise _failed(error) from error
        return await asyncio.to_thread(self._read, answer)

    async def encode(
        self, lane: Lane, texts: Sequence[str], *, add_special_tokens: bool, at_most: int
    ) -> list[list[int]]:
        """Tokenise texts. Raises TooManyTokens for the first over ``at_most``, InvalidRequest and QueueFull."""
        asked = {"texts": list(texts), "add_special_tokens": add_special_tokens, "at_most": at_most}
        head, rest = await self._ask(asked)
        if "count" in head:
            raise TooManyTokens(head["count"], at_least=head["at_least"])
        ids = array("I", rest).tolist()
        ends = 0
        found = []
        for length in head["lengths"]:
            found.append(ids[ends : ends + length])
            ends += length
        return found

    async def spell(self, lane: Lane, ids: Sequence[int]) -> str:
        """Turn ids into text, control tokens spelled out. Raises InvalidRequest and QueueFull."""
        head, _ = await self._ask({"ids": list(ids)})
        return str(head["text"])

    def rest(self) -> None:
        """End the process once it has nothing to do; a later question starts one again."""
        self._pool.rest()

    def close(self) -> None:
        """End the process."""
        self._pool.close()

    async def _ask(self, asked: dict[str, object]) -> tuple[dict[str, Any], bytes]:
        try:
            answer = await asyncio.wrap_future(self._pool.submit(self._question(asked), ""))
            return _parts(answer)
        except (WorkerDied, TokenizerFailed) as error:
            failed = error if isinstance(error, TokenizerFailed) else _failed(error)
            raise InvalidRequest(f"the adapter's tokenizer can't take this text: {failed}") from error
        except WorkersBusy as error:
            raise QueueFull(
                f"the adapter's tokenizer is busy: {error}; try again later", retry_after=1
            ) from error

    def _question(self, asked: dict[str, object]) -> bytes:
        whole = {"key": self.key, "directory": str(self.directory), **asked}
        return json.dumps(whole, ensure_ascii=False).encode("utf-8", "surrogatepass")

    def _load(self) -> "Future[bytes]":
        with self._lock:
            failed = (
                self._loading is not None and self._loading.done() and self._loading.exception() is not None
            )
            if self._loading is None or failed:
                self._loading = self._pool.submit(self._question({}), "")
            return self._loading

    def _read(self, answer: bytes) -> Described:
        if self._described is None:
            head, rest = _parts(answer)
            vocabulary = Vocabulary.from_bytes(rest)
            self._described = Described(
                head["fingerprint"], head["special_tokens"], head["eos_id"], vocabulary
            )
        return self._described


def _parts(answer: bytes) -> tuple[dict[str, Any], bytes]:
    line, _, rest = answer.partition(b"\n")
    head: dict[str, Any] = json.loads(line)
    if "error" in head:
        raise TokenizerFailed(head["error"])
    return head, rest


def _failed(error: WorkerDied) -> TokenizerFailed:
    if isinstance(error, WorkerTimedOut):
        return TokenizerFailed(f"it took longer than {SECONDS:g} s")
    return TokenizerFailed(f"its process ended twice: {error}")
