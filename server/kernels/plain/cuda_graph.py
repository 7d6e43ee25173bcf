"""Recording what a call gives a GPU to do, as a CUDA graph, and playing it back in one launch."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch


class CudaRecorder:
    """See decode_steps.Record. What it records shares one pool of memory: only one of them plays at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._warm = False

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    @cached_property
    def _pool(self) -> Any:  # torch's type of it has no public name
        return torch.cuda.graph_pool_handle()

    def __call__(self, call: Callable[[], None]) -> Callable[[], None]:
        """Record ``call``, which neither waits for the device nor reads its memory. Raises RuntimeError."""
        current = torch.cuda.current_stream(self._device)
        stream, graph = self._stream, torch.cuda.CUDAGraph()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            if not self._warm:
                call()  # what libraries ask for once on each stream, they can't ask for while it is recorded
                stream.synchronize()
                self._warm = True
            # Other threads, which read adapters, may go on with what a recording thread may not.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                call()
            finally:
                graph.capture_end()
        current.wait_stream(stream)
        return graph.replay
