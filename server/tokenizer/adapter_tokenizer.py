"""A tokenizer that an adapter brings: all that it does is done in a process of its own."""

import asyncio
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from manylora.server.tokenizer.lane import Lane
from manylora.server.tokenizer.tokenizer_process import (
    FAILURES,
    TokenizerProcess,
    failed,
    of_texts,
    said,
    tokens,
)
from manylora.server.tokenizer.vocabulary import Vocabulary
from manylora.server.workers.process import WorkerDied

MODULE = "manylora.server.tokenizer.worker"


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
        self.process = TokenizerProcess("the adapter's", MODULE)
        self._lock = threading.Lock()
        self._loading: Future[bytes] | None = None
        self._described: Described | None = None

    def described(self) -> Described:
        """Load the tokenizer if need be (blocking); return what it is. Raises TokenizerFailed, WorkersBusy."""
        try:
            return self._read(self._load().result())
        except WorkerDied as error:
            raise failed(error) from error

    async def describe(self) -> Described:
        """Do what ``described`` does without blocking."""
        if self._described is not None:
            return self._described
        try:
            answer = await asyncio.shield(asyncio.wrap_future(self._load()))
        except WorkerDied as error:
            raise failed(error) from error
        return await asyncio.to_thread(self._read, answer)

    async def encode(
        self, lane: Lane, texts: Sequence[str], *, add_special_tokens: bool, at_most: int
    ) -> list[list[int]]:
        """Tokenise texts. Raises TooManyTokens for the first over ``at_most``, InvalidRequest and QueueFull."""
        asked = of_texts(texts, add_special_tokens=add_special_tokens, at_most=at_most)
        try:
            return tokens(await asyncio.wrap_future(self._ask(asked)))
        except FAILURES as error:
            raise self.process.told(error) from error

    async def spell(self, lane: Lane, ids: Sequence[int]) -> str:
        """Turn ids into text, control tokens spelled out. Raises InvalidRequest and QueueFull."""
        try:
            head, _ = said(await asyncio.wrap_future(self._ask({"ids": list(ids)})))
        except FAILURES as error:
            raise self.process.told(error) from error
        return str(head["text"])

    def _ask(self, asked: Mapping[str, object]) -> "Future[bytes]":
        return self.process.ask({"key": self.key, "directory": str(self.directory), **asked})

    def _load(self) -> "Future[bytes]":
        with self._lock:
            loading = self._loading
            if loading is None or (loading.done() and loading.exception() is not None):
                loading = self._loading = self._ask({})
            return loading

    def _read(self, answer: bytes) -> Described:
        if self._described is None:
            head, rest = said(answer)
            vocabulary = Vocabulary.from_bytes(rest)
            self._described = Described(
                head["fingerprint"], head["special_tokens"], head["eos_id"], vocabulary
            )
        return self._described
