"""A tokenizer in a process of its own, from the side of whoever asks it.

The libraries hold the interpreter while they load a large one, and while they free what a long text became: a second
and a quarter of a second in which no answer goes on. And what comes from outside may do worse.
"""

import json
from array import array
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from manylora.server.errors import InvalidRequest, QueueFull
from manylora.server.tokenizer.tokenizer import TooManyTokens
from manylora.server.workers.pool import WorkerPool, WorkersBusy
from manylora.server.workers.process import WorkerDied, WorkerProcess, WorkerTimedOut

MODULE = "manylora.server.tokenizer.worker"
SECONDS = 60.0
"""For one question, loading included: a large tokenizer takes a few seconds at a low priority."""


class TokenizerFailed(Exception):
    """The tokenizer can't be loaded or used. The message says why."""


class TokenizerProcess:
    """Asks a process, which is started when it is needed. Any thread may call.

    ``directory`` may change, if the same files are there.
    """

    def __init__(self, whose: str, key: str, directory: Path) -> None:
        """``whose`` it is, messages say: "the base's"; ``key`` stands for the contents of the files."""
        self.key = key
        self.directory = directory
        self._whose = whose
        self._pool = WorkerPool(lambda: WorkerProcess(MODULE), size=1, seconds=SECONDS)

    @property
    def pids(self) -> tuple[int, ...]:
        """The process's id, if there is one."""
        return self._pool.pids

    def ask(self, asked: Mapping[str, object]) -> "Future[bytes]":
        """Return what will hold the answer (see ``parts``), or WorkerDied or WorkersBusy (see ``told``)."""
        whole = {"key": self.key, "directory": str(self.directory), **asked}
        return self._pool.submit(json.dumps(whole, ensure_ascii=False).encode("utf-8", "surrogatepass"), "")

    def told(self, error: Exception) -> Exception:
        """Return how whoever asked is told of ``error``: InvalidRequest, QueueFull, or the error itself."""
        if isinstance(error, WorkersBusy):
            return QueueFull(f"{self._whose} tokenizer is busy: {error}; try again later", retry_after=1)
        if isinstance(error, WorkerDied | TokenizerFailed):
            return InvalidRequest(f"{self._whose} tokenizer can't take this text: {failed(error)}")
        return error

    def rest(self) -> None:
        """End the process once it has nothing to do; a later question starts one again."""
        self._pool.rest()

    def close(self) -> None:
        """End the process."""
        self._pool.close()


def encoding_of(texts: Sequence[str], *, add_special_tokens: bool, at_most: int) -> dict[str, object]:
    """Return the question for the tokens of texts, each of at most so many tokens; see ``tokens``."""
    return {"texts": list(texts), "add_special_tokens": add_special_tokens, "at_most": at_most}


def tokens(answer: bytes) -> list[list[int]]:
    """Read each text's ids from an answer. Raises TooManyTokens and TokenizerFailed."""
    head, rest = parts(answer)
    if "count" in head:
        raise TooManyTokens(head["count"], at_least=head["at_least"])
    ids = array("I", rest).tolist()
    ends = 0
    found = []
    for length in head["lengths"]:
        found.append(ids[ends : ends + length])
        ends += length
    return found


def parts(answer: bytes) -> tuple[dict[str, Any], bytes]:
    """Split an answer into what it says and the bytes behind it. Raises TokenizerFailed."""
    line, _, rest = answer.partition(b"\n")
    head: dict[str, Any] = json.loads(line)
    if "error" in head:
        raise TokenizerFailed(head["error"])
    return head, rest


def failed(error: WorkerDied | TokenizerFailed) -> TokenizerFailed:
    """Return why a process gave no answer."""
    if isinstance(error, TokenizerFailed):
        return error
    if isinstance(error, WorkerTimedOut):
        return TokenizerFailed(f"it took longer than {SECONDS:g} s")
    return TokenizerFailed(f"its process ended twice: {error}")
