"""What a client reads: the outputs of its request's prompts, as the engine's thread delivers them. Lives on the event
loop."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

from manylora.server.engine.request import FinishReason, GenerationRequest, SequenceOutput

UNREAD = 256
"""Outputs, beyond two of each choice, that wait for a reader as they came; more are joined, so that who doesn't read
takes the memory of its text and no more."""

Numbered = tuple[int, SequenceOutput]
"""An output and the number of its choice, among those of all the prompts."""


class OutputStream:
    """The outputs of a client's request: one queue for all its prompts and their choices, and one reader.

    Choices are numbered through: the second prompt's first is the first prompt's ``n``.
    """

    def __init__(self, requests: Sequence[GenerationRequest], abort: Callable[[str], None]) -> None:
        """``abort`` ends the request with an id."""
        self._abort = abort
        self._open = {request.request_id: set(range(request.n)) for request in requests}
        """Choices that have not ended; a request is left out once all of its have."""
        self._first: dict[str, int] = {}
        count = 0
        for request in requests:
            self._first[request.request_id] = count
            count += request.n
        self._most = UNREAD + 2 * count
        self._ready: list[Numbered] = []
        self._made: dict[int, int] = {}
        """Tokens of each choice."""
        self._waiter: asyncio.Future[None] | None = None
        self._nudged = False

    @property
    def request_ids(self) -> tuple[str, ...]:
        """The ids of its requests, one for each prompt."""
        return tuple(self._first)

    @property
    def ended(self) -> bool:
        """Whether every choice has ended, read or not."""
        return not self._open

    @property
    def made(self) -> int:
        """How many tokens have been made for all choices, read or not."""
        return sum(self._made.values())

    def fail(self, error: Exception) -> None:
        """End every choice that has not ended. On the event loop."""
        for request_id, choices in list(self._open.items()):
            for index in sorted(choices):
                failed = FinishReason.FAILED
                self.feed(SequenceOutput(request_id, index, "", (), finish_reason=failed, error=error))

    def feed(self, output: SequenceOutput) -> bool:
        """Take an output in; return whether its request is over with it. On the event loop."""
        number = self._first[output.request_id] + output.index
        # What ends a choice wrongly may not count what came before.
        self._made[number] = max(self._made.get(number, 0), output.completion_tokens)
        self._ready.append((number, output))
        if len(self._ready) > self._most:
            self._ready = _joined(self._ready)
        over = output.finish_reason is not None and self._end(output)
        self._wake()
        return over

    def nudge(self) -> None:
        """Let the reader go on although there may be nothing to read."""
        self._nudged = True
        self._wake()

    def abort(self) -> None:
        """End what has not ended and free what it holds within one step."""
        for request_id in self._open:
            self._abort(request_id)

    async def take(self) -> list[Numbered] | None:
        """Return what has come since the last call, once there is something; none of it: every choice has ended.

        None: nothing has come, but somebody nudged.
        """
        while not self._ready:
            if self._nudged:
                self._nudged = False
                return None
            if not self._open:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        ready, self._ready = self._ready, []
        return ready

    async def __aiter__(self) -> AsyncIterator[list[SequenceOutput]]:
        """Yield the outputs of one or more steps; end after every choice has."""
        while (outputs := await self.take()) != []:
            if outputs is not None:
                yield [output for _, output in outputs]

    def _end(self, output: SequenceOutput) -> bool:
        choices = self._open.get(output.request_id)
        if choices is None:
            return False
        choices.discard(output.index)
        if not choices:
            del self._open[output.request_id]
        return not choices

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


def _joined(outputs: Sequence[Numbered]) -> list[Numbered]:
    """Return one output for each choice, which says what its outputs said."""
    parts: dict[int, list[SequenceOutput]] = {}
    for number, output in outputs:
        parts.setdefault(number, []).append(output)
    return [(number, _join(each)) for number, each in parts.items()]


def _join(parts: Sequence[SequenceOutput]) -> SequenceOutput:
    if len(parts) == 1:
        return parts[0]
    told = (part.prompt_logprobs for part in parts if part.prompt_logprobs is not None)
    sized = next((part for part in reversed(parts) if part.completion_tokens), parts[-1])
    return replace(
        parts[-1],
        text="".join(part.text for part in parts),
        token_ids=tuple(token for part in parts for token in part.token_ids),
        logprobs=tuple(each for part in parts for each in part.logprobs),
        lengths=tuple(
            length for part in parts if part.logprobs for length in part.lengths or (len(part.text),)
        ),
        prompt_logprobs=next(told, None),
        prompt_tokens=sized.prompt_tokens,
        completion_tokens=sized.completion_tokens,
        cached_tokens=sized.cached_tokens,
    )
