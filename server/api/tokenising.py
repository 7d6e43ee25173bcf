"""The threads that tokenise, and how much they may be given.

A tokenizer takes up to 600 bytes for each character while it works, and some microseconds. So few texts are at work at
once, a long one keeps nobody's short one waiting, and those who only want to look at tokens have threads of their own.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from manylora.server.errors import InvalidRequest, QueueFull
from manylora.server.memory import give_back
from manylora.server.threads import step_back
from manylora.server.tokenizer.lane import LONG

Result = TypeVar("Result")
CHARACTERS_A_TOKEN = 16
"""Of a prompt, on average, at most: text has about four, code with deep indentation up to eight."""
THREADS = 2
"""For texts that aren't."""
MOST_PROMPTS, MOST_LOOKS = 4096, 16
"""Requests that may be with the tokenizer, at work or waiting: prompts, and those of /tokenize and /detokenize."""


class Lane:
    """Threads for one kind of request. Use on the event loop."""

    def __init__(self, most: int, threads: int, name: str) -> None:
        self._most = most
        self._name = name
        self.inside = 0
        """Requests that are with it."""
        self._short = ThreadPoolExecutor(threads, name, step_back)
        self._long = ThreadPoolExecutor(1, f"{name}-long", step_back)

    async def run(self, work: Callable[[], Result], characters: int) -> Result:
        """Return what ``work`` on so many characters does, in a thread. Raises QueueFull."""
        if self.inside >= self._most:
            raise QueueFull(
                f"{self.inside} requests are being tokenised already; try again later", retry_after=1
            )
        self.inside += 1
        try:
            if characters <= LONG:
                return await asyncio.get_running_loop().run_in_executor(self._short, work)
            return await asyncio.get_running_loop().run_in_executor(self._long, _given_back, work)
        finally:
            self.inside -= 1

    def close(self) -> None:
        """End the threads; what waits is cancelled."""
        for threads in (self._short, self._long):
            threads.shutdown(wait=False, cancel_futures=True)


def _given_back(work: Callable[[], Result]) -> Result:
    """Do ``work``, and let the system have the memory again that it took.

    glibc keeps what millions of small pieces leave in a thread's heap: 600 MiB after six million characters.
    """
    try:
        return work()
    finally:
        give_back()


class Tokenising:
    """The lanes: for prompts that are to be answered, and for texts that are only looked at."""

    def __init__(self) -> None:
        self.prompts = Lane(MOST_PROMPTS, THREADS, "tokenise-prompt")
        self.looks = Lane(MOST_LOOKS, 1, "tokenise-look")

    def close(self) -> None:
        """End the threads."""
        self.prompts.close()
        self.looks.close()


def most_characters(tokens: int) -> int:
    """Return how long a prompt may be that is to have at most so many tokens."""
    return max(LONG, CHARACTERS_A_TOKEN * tokens)


def check_length(characters: int, most: int, param: str) -> None:
    """Refuse a text that is longer than may be looked at. Raises InvalidRequest with the numbers."""
    if characters > most:
        raise InvalidRequest(
            f"the text has {characters} characters, at most {most} are tokenised here: send it in parts",
            param=param,
        )
