"""A tokenizer in a process of its own, from the side of whoever asks it.

The libraries hold the interpreter while they load a large one, and while they free what a long text became: a second
and a quarter of a second in which no answer goes on. And what comes from outside may do worse.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from manylora.server.errors import InvalidRequest, QueueFull
from manylora.server.tokenizer.tokenizer import TooManyTokens
from manylora.server.workers.answers import read, read_lists
from manylora.server.workers.pool import WorkerPool, WorkersBusy
from manylora.server.workers.process import WorkerDied, WorkerProcess, WorkerTimedOut

SECONDS = 60.0
"""For one question, loading included: a large tokenizer takes a few seconds at a low priority."""


class TokenizerFailed(Exception):
    """The tokenizer can't be loaded or used. The message says why."""


FAILURES = (TokenizerFailed, WorkerDied, WorkersBusy)
"""What a question may end in; see ``TokenizerProcess.told``."""


class TokenizerProcess:
    """Asks a process, which is started when it is needed. Any thread may call."""

    def __init__(self, whose: str, module: str) -> None:
        """``whose`` it is, messages say: "the base's"; ``module`` is what the process runs."""
        self._whose = whose
        self._pool = WorkerPool(lambda: WorkerProcess(module), size=1, seconds=SECONDS)

    @property
    def pids(self) -> tuple[int, ...]:
        """The process's id, if there is one."""
        return self._pool.pids

    def ask(self, asked: Mapping[str, object]) -> "Future[bytes]":
        """Return what will hold the answer, or WorkerDied or WorkersBusy."""
        return self._pool.submit(json.dumps(asked, ensure_ascii=False).encode("utf-8", "surrogatepass"), "")

    def told(self, error: Exception) -> Exception:
        """Return how whoever asked is told of one of FAILURES."""
        if isinstance(error, WorkersBusy):
            return QueueFull(f"{self._whose} tokenizer is busy: {error}; try again later", retry_after=1)
        return InvalidRequest(f"{self._whose} tokenizer can't take this text: {_why(error)}")

    def rest(self) -> None:
        """End the process once it has nothing to do; a later question starts one again."""
        self._pool.rest()

    def close(self) -> None:
        """End the process."""
        self._pool.close()


def said(answer: bytes) -> tuple[dict[str, Any], bytes]:
    """Take an answer apart. Raises TokenizerFailed."""
    head, rest = read(answer)
    if "error" in head:
        raise TokenizerFailed(head["error"])
    return head, rest


def of_texts(texts: Sequence[str], *, add_special_tokens: bool, at_most: int) -> dict[str, object]:
    """Return the question for the texts' tokens, whose answer ``tokens`` reads."""
    return {"texts": list(texts), "add_special_tokens": add_special_tokens, "at_most": at_most}


def tokens(answer: bytes) -> list[list[int]]:
    """Read each text's ids from an answer. Raises TooManyTokens and TokenizerFailed."""
    head, rest = said(answer)
    if "count" in head:
        raise TooManyTokens(head["count"], at_least=head["at_least"])
    return read_lists(head, rest)


def failed(error: WorkerDied) -> TokenizerFailed:
    """Return why a process gave no answer."""
    return TokenizerFailed(_why(error))


def _why(error: Exception) -> str:
    if isinstance(error, WorkerTimedOut):
        return f"it took longer than {SECONDS:g} s"
    return f"its process ended twice: {error}" if isinstance(error, WorkerDied) else str(error)
