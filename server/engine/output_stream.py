"""What a request's client reads: its outputs as the engine's thread delivers them. Lives on the event loop."""

import asyncio
from collections.abc import AsyncIterator, Callable

from manylora.server.engine.request import FinishReason, GenerationRequest, SequenceOutput


class OutputStream:
    """One request's outputs. Iterated on the event loop; a slow reader gets several steps at once."""

    def __init__(self, request: GenerationRequest, abort: Callable[[str], None]) -> None:
        """``abort`` ends the request with an id."""
        self._abort = abort
        self.request_id = request.request_id
        self._open = set(range(request.n))
        self._ready: list[SequenceOutput] = []
        self._event = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether every choice has ended, read or not."""
        return not self._open

    def fail(self, error: Exception) -> None:
        """End every choice that has not ended. On the event loop."""
        for index in sorted(self._open):
            failed = FinishReason.FAILED
            self.feed(SequenceOutput(self.request_id, index, "", (), finish_reason=failed, error=error))

    def feed(self, output: SequenceOutput) -> None:
        """Take an output in. On the event loop."""
        self._ready.append(output)
        if output.finish_reason is not None:
            self._open.discard(output.index)
        self._event.set()

    def abort(self) -> None:
        """End the request and free what it holds within one step; harmless when it has ended."""
        if not self.ended:
            self._abort(self.request_id)

    async def __aiter__(self) -> AsyncIterator[list[SequenceOutput]]:
        """Yield the outputs of one or more steps; end after every choice has."""
        while self._ready or not self.ended:
            await self._event.wait()
            self._event.clear()
            outputs, self._ready = self._ready, []
            if outputs:
                yield outputs
